// The first launch of Adafactor's step: one read of gradients and parameters.
#include "../prologue.h"
#include "adafactor.h"
#include "adafactor_tiles.h"
#include "block.h"
#include "operands.h"

namespace fused::cuda {
namespace {

// What a block knows of its tile; in shared memory, so that it takes no registers.
struct Job {
  TensorRow row;
  AdafactorRow by;
  AdafactorArgs tables;
  const void* grad;
  int64_t index;  // of the tile
  Tile tile;
  double hyper[kMaxHypers];
  Adafactor::Moments moments;
  double factor;  // of the gradient
  double count;   // steps, with this one
  bool skip;
};

// Decides as every block does; the first one reports.
__device__ __forceinline__ void open(const AdafactorStatsArgs& args, const Piece& piece, Job& job) {
  StepControl control = args.control;
  if (blockIdx.x != 0) {
    control.grad_norm = control.skipped = nullptr;
    control.unscale = nullptr;
  }
  const StepDecision decision = decide(control);
  job.skip = decision.skip;
  if (decision.skip) return;
  job.tables = args.tables;
  job.row = args.tables.rows[piece.row].tensor;
  job.by = args.tables.factored[piece.row];
  job.grad = args.tables.grads[piece.row];
  job.index = piece.index;
  job.tile = tile_of(job.by, job.row.numel, piece.index);
  const GroupRow& group = args.groups != nullptr ? args.groups[job.row.group] : args.inline_groups[job.row.group];
  read_hypers(group, job.hyper);
  job.count = double(*job.row.step + 1.0f);  // the tensor's last block stores it
  job.factor = decision.grad_factor * group.grad_sign;
  job.moments = Adafactor::moments(job.hyper, job.by.shape.flags, job.count, job.row.param_format == kFloat64);
}

// ---- squares of parameters ----

template <class T>
__device__ __forceinline__ double sum_squares(const T (&x)[kVector]) {
  T sum = T(0);
#pragma unroll
  for (int j = 0; j < kVector; ++j) sum = fma_(x[j], x[j], sum);
  return double(sum);
}

template <class Raw>
__device__ __forceinline__ double vectors_squared(const void* base, const Lines& lines, AsFloat convert) {
  constexpr int U = kLinesAtOnce<Raw>;
  double total = 0.0;
  for (int line = first_line(); line < lines.count; line += kWarps * U) {
    Raw raw[U][kVector];
    bool present[U];
    load_lines(base, lines, line, raw, present);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float x[kVector];
#pragma unroll
      for (int j = 0; j < kVector; ++j) x[j] = convert(raw[u][j]);
      total += present[u] ? sum_squares(x) : 0.0;
    }
  }
  return total;
}

// Of parameters with remainders, and of those that lie in no vectors.
__device__ __forceinline__ double places_squared(const TensorRow& row, const Lines& lines) {
  constexpr int U = 2;  // lines that are under way at once
  double total = 0.0;
  for (int line = first_line(); line < lines.count; line += kWarps * U) {
    Fetched raw[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int mine = line + u * kWarps;
      fetch_param<false>(row, {lines.begin + mine * lines.stride + first_column(), count_at(lines, mine)}, raw[u]);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float x[kVector];
      param_to_float(row, raw[u], x);
      total += count_at(lines, line + u * kWarps) > 0 ? sum_squares(x) : 0.0;
    }
  }
  return total;
}

// A thread's share.
template <class T>
__device__ __forceinline__ double param_squares(const Job& job) {
  if ((job.by.shape.flags & Adafactor::kScaleParameter) == 0) return 0.0;
  const TensorRow& row = job.row;
  const Lines lines = lines_of(job.by, job.tile);
  if constexpr (sizeof(T) == 4) {
    const bool master = row.master_format == kFloat32, alone = row.master_format == kNone;
    const void* base = master ? row.master : row.param;
    const AsFloat convert = {row.param_format == kBFloat16};
    if (master || (alone && row.param_format == kFloat32)) {
      if (in_vectors<float>(base, lines)) return vectors_squared<float>(base, lines, convert);
    } else if (alone && in_vectors<unsigned short>(base, lines)) {
      return vectors_squared<unsigned short>(base, lines, convert);
    }
    return places_squared(row, lines);
  } else {
    double total = 0.0;
    for (int line = first_line(); line < lines.count; line += kWarps) {
      T x[kVector];
      const int count = count_at(lines, line);
      load<Reuse::kAgain>(kFloat64, row.param, lines.begin + line * lines.stride + first_column(), count, x);
      total += count > 0 ? sum_squares(x) : 0.0;
    }
    return total;
  }
}

// ---- averages ----

// Row `r` over all matrices, from the sum of its squares.
template <class T>
__device__ __forceinline__ T average_row(const Job& job, int64_t r, double sum) {
  T* var = static_cast<T*>(job.by.shape.row_var) + r;
  const Adafactor::Moments& c = job.moments;
  return *var = lerp(*var, T(sum / double(job.by.shape.cols) + c.added), T(c.weight));
}

// Column `c` over all matrices; leaves its factor, too.
template <class T>
__device__ __forceinline__ void average_column(const Job& job, int64_t c, double sum) {
  T* var = static_cast<T*>(job.by.shape.col_var) + c;
  const Adafactor::Moments& m = job.moments;
  *var = lerp(*var, T(sum / double(job.by.shape.rows) + m.added), T(m.weight));
  at<T>(job.tables, job.by.col_factor)[c] = Adafactor::inverse_root(*var);
}

// ---- rectangles of wide matrices ----

// The sums over a warp of U values per lane. Afterwards lane l has that of value l / (kWarp / U).
template <class T, int U>
__device__ __forceinline__ T sum_over_warp(T (&value)[U]) {
  const int lane = int(threadIdx.x) % kWarp;
  int lanes = kWarp / 2;
#pragma unroll
  for (int left = U / 2; left > 0; left /= 2, lanes /= 2) {  // half of the lanes take half of the values
    const bool upper = (lane & lanes) != 0;
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const T kept = upper ? value[i + left] : value[i], given = upper ? value[i] : value[i + left];
      value[i] = kept + __shfl_xor_sync(0xffffffffu, given, lanes);
    }
  }
#pragma unroll
  for (; lanes > 0; lanes /= 2) value[0] += __shfl_xor_sync(0xffffffffu, value[0], lanes);
  return value[0];
}

template <class T>
__device__ __forceinline__ T* row_part(const Job& job, int64_t line) {
  const int64_t r = job.tile.matrix * job.by.shape.rows + job.tile.line + line;
  return at<T>(job.tables, job.by.row_part) + r * job.by.col_tiles;
}

template <class T>
__device__ __forceinline__ T* col_part(const Job& job) {
  const int64_t row_tile = job.tile.line / job.by.lines;
  return at<T>(job.tables, job.by.col_part) + (job.tile.matrix * job.by.row_tiles + row_tile) * job.by.shape.cols + job.tile.col;
}

// `fetch(line, raw, present)` loads U lines from `line` on, kWarps apart.
template <int U, class T, class Raw, class Fetch, class Convert>
__device__ __forceinline__ void sum_lines(const Job& job, T (&col)[kVector], Fetch fetch, Convert convert) {
  const T factor = T(job.factor);
  const int64_t col_tile = job.tile.col / job.by.width;
  for (int line = first_line(); line < job.tile.lines; line += kWarps * U) {
    Raw raw[U][kVector];
    bool present[U];
    fetch(line, raw, present);
    T sum[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      sum[u] = T(0);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const T x = present[u] ? convert(raw[u][j]) * factor : T(0);
        const T square = x * x;
        col[j] += square;
        sum[u] += square;
      }
    }
    const T total = sum_over_warp(sum);
    const int lane = int(threadIdx.x) % kWarp, mine = line + lane / (kWarp / U) * kWarps;
    if (lane % (kWarp / U) == 0 && mine < job.tile.lines) row_part<T>(job, mine)[col_tile] = total;
  }
}

template <class T>
__device__ __forceinline__ void sum_rectangle(const Job& job, unsigned char* memory) {
  const Lines lines = lines_of(job.by, job.tile);
  const uint8_t format = job.row.grad_format;
  T col[kVector] = {};
  bool done = false;
  if constexpr (sizeof(T) == 4) {
    const AsFloat convert = {format == kBFloat16};
    if (format == kFloat32 && in_vectors<float>(job.grad, lines)) {
      const auto fetch = [&](int line, auto& raw, auto& present) { load_lines(job.grad, lines, line, raw, present); };
      sum_lines<kLinesAtOnce<float>, T, float>(job, col, fetch, convert);
      done = true;
    } else if (format != kFloat32 && format != kFloat64 && in_vectors<unsigned short>(job.grad, lines)) {
      const auto fetch = [&](int line, auto& raw, auto& present) { load_lines(job.grad, lines, line, raw, present); };
      sum_lines<kLinesAtOnce<unsigned short>, T, unsigned short>(job, col, fetch, convert);
      done = true;
    }
  }
  if (!done) {
    const auto fetch = [&](int line, T(&x)[1][kVector], bool(&present)[1]) {
      const int count = count_at(lines, line);
      load<Reuse::kAgain>(format, job.grad, lines.begin + line * lines.stride + first_column(), count, x[0]);
      present[0] = count > 0;
    };
    sum_lines<1, T, T>(job, col, fetch, [](T x) { return x; });
  }

  T(*of_warp)[kRectangleWidth] = reinterpret_cast<T(*)[kRectangleWidth]>(memory);
  static_assert(kWarps * kRectangleWidth * sizeof(T) <= kStagedBytes, "");
#pragma unroll
  for (int j = 0; j < kVector; ++j) of_warp[first_line()][first_column() + j] = col[j];
  __syncthreads();
  const int c = int(threadIdx.x);
  static_assert(kThreads == kRectangleWidth, "a thread for each column");
  if (c < job.tile.width) {
    double total = 0.0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += double(of_warp[w][c]);
    col_part<T>(job)[c] = T(total);
  }
}

// ---- narrow matrices, whose squares a block keeps ----

// The place of square i: lines of a power of two elements would all begin in the same bank.
__device__ __forceinline__ int staged_at(int i) { return i + i / kWarp; }

template <class T>
__device__ __forceinline__ void stage(const Job& job, T* squares) {
  const T factor = T(job.factor);
  for (int first = int(threadIdx.x) * kVector; first < job.tile.elements; first += kThreads * kVector) {
    const int left = job.tile.elements - first, count = left < kVector ? left : kVector;
    T x[kVector];
    load<Reuse::kAgain>(job.row.grad_format, job.grad, job.tile.begin + first, count, x);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      x[j] *= factor;
      if (j < count) squares[staged_at(first + j)] = x[j] * x[j];
    }
  }
}

// done(i, sum over k in [0, length) of value(i, k)) for each i in [0, count), each by several neighbouring lanes where
// there are threads enough. The whole block takes part.
template <class T, class Value, class Done>
__device__ __forceinline__ void sums(int count, int64_t length, Value value, Done done) {
  constexpr int kRun = 16;  // added up in T, the rest in float64
  int lanes = 1;
  while (lanes < kWarp && count * lanes * 2 <= kThreads && lanes * 2 <= length) lanes *= 2;
  for (int first = 0; first < count; first += kThreads / lanes) {
    const int i = first + int(threadIdx.x) / lanes;
    double total = 0.0;
    for (int64_t k = int(threadIdx.x) % lanes; i < count && k < length; k += lanes * kRun) {
      T run = T(0);
#pragma unroll 4
      for (int n = 0; n < kRun && k + n * lanes < length; ++n) run += value(i, k + n * lanes);
      total += double(run);
    }
    for (int step = lanes / 2; step > 0; step /= 2) total += __shfl_down_sync(0xffffffffu, total, unsigned(step), lanes);
    if (int(threadIdx.x) % lanes == 0 && i < count) done(i, total);
  }
}

template <class T>
__device__ __forceinline__ void sum_staged(const Job& job, unsigned char* memory) {
  T* squares = reinterpret_cast<T*>(memory);
  const FactoredRow& shape = job.by.shape;
  const Tile& tile = job.tile;
  const bool whole = job.by.cut == Cut::kMatrices;
  const int cols = int(shape.cols), height = whole ? int(shape.rows) : tile.lines, matrices = tile.lines / height;
  stage(job, squares);
  __syncthreads();

  double of_rows = 0.0;
  const int64_t first_row = tile.matrix * shape.rows + tile.line;
  sums<T>(
      tile.lines, cols, [&](int r, int64_t c) { return squares[staged_at(r * cols + int(c))]; },
      [&](int r, double sum) { of_rows += double(average_row<T>(job, first_row + r, sum)); });
  sums<T>(
      matrices * cols, height,
      [&](int i, int64_t r) { return squares[staged_at((i / cols * height + int(r)) * cols + i % cols)]; },
      [&](int i, double sum) {
        if (whole) average_column<T>(job, tile.matrix * cols + i, sum);
        else col_part<T>(job)[i] = T(sum);
      });
  if (!whole) {
    of_rows = join_block(of_rows);
    if (threadIdx.x == 0) at<double>(job.tables, job.by.mean_part)[job.index] = of_rows;
    return;
  }
  __syncthreads();  // the averages of rows are written
  const T* row_var = static_cast<const T*>(shape.row_var) + first_row;
  sums<T>(
      matrices, height, [&](int m, int64_t r) { return __ldcg(row_var + m * int64_t(height) + r); },
      [&](int m, double sum) {
        at<double>(job.tables, job.by.mean)[tile.matrix + m] = max_nan(sum / double(height), job.moments.least_mean);
      });
}

// ---- tensors that are not factored ----

// A thread's share of the squared updates.
template <class T>
__device__ __forceinline__ double average_elements(const Job& job) {
  const Adafactor::Moments& c = job.moments;
  const T factor = T(job.factor), weight = T(c.weight), added = T(c.added), limit = T(c.limit);
  T* variance = static_cast<T*>(job.by.shape.variance) + job.tile.begin;
  double total = 0.0;
  for (int first = int(threadIdx.x) * kVector; first < job.tile.elements; first += kThreads * kVector) {
    const int left = job.tile.elements - first, count = left < kVector ? left : kVector;
    T x[kVector], var[kVector], sum = T(0);
    load_raw<Reuse::kAgain>(variance + first, count, var);
    load<Reuse::kAgain>(job.row.grad_format, job.grad, job.tile.begin + first, count, x);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      x[j] *= factor;
      var[j] = lerp(var[j], x[j] * x[j] + added, weight);
      const T update = j < count ? x[j] * Adafactor::bounded(Adafactor::inverse_root(var[j]), limit) : T(0);
      sum = fma_(update, update, sum);
    }
    store_raw<Reuse::kAgain>(variance + first, count, var);
    total += double(sum);
  }
  return total;
}

// ---- what the last blocks do ----

// The last tile of a row of tiles averages its lines, the last one of a column of tiles its columns.
template <class T>
__device__ __forceinline__ void average_lines(const Job& job) {
  const AdafactorRow& by = job.by;
  const Tile& tile = job.tile;
  const int64_t row_tile = tile.line / by.lines, col_tile = tile.col / by.width;
  uint32_t* rows_arrived = at<uint32_t>(job.tables, by.arrived) + 1 + tile.matrix * by.row_tiles + row_tile;
  uint32_t* cols_arrived =
      at<uint32_t>(job.tables, by.arrived) + 1 + by.shape.lead * by.row_tiles + tile.matrix * by.col_tiles + col_tile;

  if (by.cut == Cut::kRectangles && is_last(rows_arrived, unsigned(by.col_tiles))) {
    double total = 0.0;
    for (int line = int(threadIdx.x); line < tile.lines; line += kThreads) {
      const T* parts = row_part<T>(job, line);
      double sum = 0.0;
#pragma unroll 8
      for (int64_t i = 0; i < by.col_tiles; ++i) sum += double(__ldcg(parts + i));
      const int64_t r = tile.matrix * by.shape.rows + tile.line + line;
      total += double(average_row<T>(job, r, sum));
    }
    total = join_block(total);
    if (threadIdx.x == 0) {
      at<double>(job.tables, by.mean_part)[tile.matrix * by.row_tiles + row_tile] = total;
      *rows_arrived = 0u;
    }
  }
  if (is_last(cols_arrived, unsigned(by.row_tiles))) {
    const T* parts = at<T>(job.tables, by.col_part) + tile.matrix * by.row_tiles * by.shape.cols + tile.col;
    for (int c = int(threadIdx.x); c < tile.width; c += kThreads) {
      double sum = 0.0;
#pragma unroll 8
      for (int64_t i = 0; i < by.row_tiles; ++i) sum += double(__ldcg(parts + i * by.shape.cols + c));
      average_column<T>(job, tile.matrix * by.shape.cols + tile.col + c, sum);
    }
    if (threadIdx.x == 0) *cols_arrived = 0u;
  }
}

__device__ __forceinline__ void average_means(const Job& job) {
  const AdafactorRow& by = job.by;
  const double* parts = at<double>(job.tables, by.mean_part);
  double* mean = at<double>(job.tables, by.mean);
  const double rows = double(by.shape.rows), least = job.moments.least_mean;
  if (by.shape.lead < kWarp) {
    for (int64_t m = 0; m < by.shape.lead; ++m) {
      const double total = sum_parts(parts + m * by.row_tiles, by.row_tiles);
      if (threadIdx.x == 0) mean[m] = max_nan(total / rows, least);
    }
    return;
  }
  for (int64_t m = threadIdx.x; m < by.shape.lead; m += kThreads) {
    double total = 0.0;
    for (int64_t i = 0; i < by.row_tiles; ++i) total += __ldcg(parts + m * by.row_tiles + i);
    mean[m] = max_nan(total / rows, least);
  }
}

__device__ __forceinline__ void finish_tensor(const Job& job, AdafactorWork& work) {
  const AdafactorRow& by = job.by;
  if (by.cut == Cut::kLines || by.cut == Cut::kRectangles) average_means(job);
  const double numel = double(job.row.numel), params = sum_parts(at<double>(job.tables, by.param_squares), by.tiles);
  const double updates = by.cut == Cut::kElements ? sum_parts(at<double>(job.tables, by.update_squares), by.tiles) : 0.0;
  if (threadIdx.x != 0) return;
  memcpy(work.hyper, job.hyper, sizeof work.hyper);
  work.factor = job.factor;
  work.limit = job.moments.limit;
  work.count = job.count;
  work.rms_param = job.row.numel != 0 ? sqrt(params / numel) : 0.0;
  const double rms_update = job.row.numel != 0 ? sqrt(updates / numel) : 0.0;
  work.step = Adafactor::step(job.hyper, by.shape.flags, job.count, work.rms_param, rms_update);
  work.skip = 0u;
  *job.row.step = float(job.count);
  *at<uint32_t>(job.tables, by.arrived) = 0u;
}

template <class T>
__device__ __forceinline__ void read_tile(const Job& job, unsigned char* memory) {
  double updates = 0.0;
  const Cut cut = job.by.cut;
  if (cut == Cut::kRectangles) sum_rectangle<T>(job, memory);
  else if (cut == Cut::kElements) updates = average_elements<T>(job);
  else sum_staged<T>(job, memory);
  const double params = join_block(param_squares<T>(job));
  if (cut == Cut::kElements) updates = join_block(updates);
  if (threadIdx.x == 0) {
    at<double>(job.tables, job.by.param_squares)[job.index] = params;
    at<double>(job.tables, job.by.update_squares)[job.index] = updates;
  }
  if (cut == Cut::kRectangles || cut == Cut::kLines) average_lines<T>(job);
}

}  // namespace

__global__ void __launch_bounds__(kThreads, 2) adafactor_stats(const __grid_constant__ AdafactorStatsArgs args) {
  __shared__ Job job;
  // The squares, with one place in between for every 32 of them.
  alignas(16) __shared__ unsigned char memory[kStagedBytes + kStagedBytes / kWarp];
  if (args.tile_count == 0) {
    if (threadIdx.x == 0) decide(args.control);
    return;
  }
  const Piece piece = args.tables.tiles[blockIdx.x];
  if (threadIdx.x == 0) open(args, piece, job);
  __syncthreads();
  AdafactorWork& work = args.tables.work[piece.row];
  if (job.skip) {
    if (threadIdx.x == 0 && piece.index == 0) work.skip = 1u;
    return;
  }
  if (job.row.param_format == kFloat64) read_tile<double>(job, memory);
  else read_tile<float>(job, memory);
  if (is_last(at<uint32_t>(job.tables, job.by.arrived), unsigned(job.by.tiles))) finish_tensor(job, work);
}

}  // namespace fused::cuda

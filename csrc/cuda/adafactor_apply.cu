// The second and third launch of Adafactor's step: how large the updates are, and the updates.
#include "adafactor.h"
#include "adafactor_tiles.h"
#include "block.h"
#include "operands.h"

namespace fused::cuda {
namespace {

__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// The inverse roots of the second moments of elements [begin, begin + count), wherever their lines end.
template <class T, int V>
__device__ __forceinline__ void load_roots(const AdafactorArgs& args, const AdafactorRow& by, T limit, int64_t begin, int count,
                                           T (&root)[V]) {
  const FactoredRow& shape = by.shape;
  if (by.cut == Cut::kElements) {
    T var[V];
    load_raw<Reuse::kOnce>(static_cast<const T*>(shape.variance) + begin, count, var);
#pragma unroll
    for (int j = 0; j < V; ++j) root[j] = Adafactor::bounded(Adafactor::inverse_root(var[j]), limit);
    return;
  }
  const double* mean = at<double>(args, by.mean);
  const T* row_var = static_cast<const T*>(shape.row_var);
  const T* col_factor = at<T>(args, by.col_factor);
  int64_t line = quotient(begin, shape.cols), c = begin - line * shape.cols, m = quotient(line, shape.rows);
  if (count > 0 && c + V <= shape.cols) {
    const T of_row = Adafactor::row_factor(T(mean[m]), row_var[line]);
    load_raw<Reuse::kAgain>(col_factor + m * shape.cols + c, V, root);
#pragma unroll
    for (int j = 0; j < V; ++j) root[j] = Adafactor::bounded(of_row * root[j], limit);
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    root[j] = T(0);
    if (j >= count) continue;
    root[j] = Adafactor::bounded(Adafactor::row_factor(T(mean[m]), row_var[line]) * col_factor[m * shape.cols + c], limit);
    if (++c < shape.cols) continue;
    c = 0;
    ++line;
    if (line - m * shape.rows == shape.rows) ++m;
  }
}

// What a lane keeps of the columns of a rectangle.
template <class T>
struct Columns {
  T mean, limit;
  const T* row_var;  // of the tile's first line
  T factor[kVector];

  __device__ __forceinline__ Columns(const AdafactorArgs& args, const AdafactorRow& by, const Tile& tile, T limit_)
      : mean(T(at<double>(args, by.mean)[tile.matrix])), limit(limit_),
        row_var(static_cast<const T*>(by.shape.row_var) + tile.matrix * by.shape.rows + tile.line) {
    const int left = tile.width - first_column();
    load_raw<Reuse::kAgain>(at<T>(args, by.col_factor) + tile.matrix * by.shape.cols + tile.col + first_column(),
                            count_of<kVector>(left), factor);
  }

  __device__ __forceinline__ void roots(T row, T (&root)[kVector]) const {
    const T of_row = Adafactor::row_factor(mean, row);
#pragma unroll
    for (int j = 0; j < kVector; ++j) root[j] = Adafactor::bounded(of_row * factor[j], limit);
  }
};

// ---- the norm of the updates ----

// `fetch(line, raw, present)` loads U lines from `line` on, kWarps apart.
template <int U, class T, class Raw, class Fetch, class Convert>
__device__ __forceinline__ double norm_lines(const Lines& lines, const Columns<T>& columns, T factor, Fetch fetch, Convert convert) {
  double total = 0.0;
  for (int line = first_line(); line < lines.count; line += kWarps * U) {
    T row[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int mine = line + u * kWarps;
      row[u] = columns.row_var[mine < lines.count ? mine : line];
    }
    Raw raw[U][kVector];
    bool present[U];
    fetch(line, raw, present);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      T root[kVector], sum = T(0);
      columns.roots(row[u], root);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const T update = convert(raw[u][j]) * factor * root[j];
        sum = fma_(update, update, sum);
      }
      total += present[u] ? double(sum) : 0.0;
    }
  }
  return total;
}

template <class T>
__device__ __forceinline__ double norm_rectangle(const AdafactorArgs& args, const TensorRow& row, const AdafactorRow& by,
                                                 const void* grad, const Tile& tile, T factor, T limit) {
  const Columns<T> columns(args, by, tile, limit);
  const Lines lines = lines_of(by, tile);
  if constexpr (sizeof(T) == 4) {
    const AsFloat convert = {row.grad_format == kBFloat16};
    const auto fetch = [&](int line, auto& raw, auto& present) { load_lines(grad, lines, line, raw, present); };
    if (row.grad_format == kFloat32 && in_vectors<float>(grad, lines))
      return norm_lines<kLinesAtOnce<float>, T, float>(lines, columns, factor, fetch, convert);
    if (row.grad_format != kFloat32 && row.grad_format != kFloat64 && in_vectors<unsigned short>(grad, lines))
      return norm_lines<kLinesAtOnce<unsigned short>, T, unsigned short>(lines, columns, factor, fetch, convert);
  }
  const auto fetch = [&](int line, T(&x)[1][kVector], bool(&present)[1]) {
    const int count = count_at(lines, line);
    load<Reuse::kAgain>(row.grad_format, grad, lines.begin + line * lines.stride + first_column(), count, x[0]);
    present[0] = count > 0;
  };
  return norm_lines<1, T, T>(lines, columns, factor, fetch, [](T x) { return x; });
}

template <class T>
__device__ __forceinline__ double norm_elements(const AdafactorArgs& args, const TensorRow& row, const AdafactorRow& by,
                                                const void* grad, const Tile& tile, T factor, T limit) {
  double total = 0.0;
  for (int first = int(threadIdx.x) * kVector; first < tile.elements; first += kThreads * kVector) {
    const int left = tile.elements - first, count = left < kVector ? left : kVector;
    T x[kVector], root[kVector], sum = T(0);
    load<Reuse::kAgain>(row.grad_format, grad, tile.begin + first, count, x);
    load_roots(args, by, limit, tile.begin + first, count, root);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const T update = j < count ? x[j] * factor * root[j] : T(0);
      sum = fma_(update, update, sum);
    }
    total += double(sum);
  }
  return total;
}

template <class T>
__device__ __forceinline__ double norm_tile(const AdafactorArgs& args, const TensorRow& row, const AdafactorRow& by, const void* grad,
                                            const Tile& tile, const AdafactorWork& work) {
  const T factor = T(work.factor), limit = T(work.limit);
  return by.cut == Cut::kRectangles ? norm_rectangle<T>(args, row, by, grad, tile, factor, limit)
                                    : norm_elements<T>(args, row, by, grad, tile, factor, limit);
}

// ---- the updates ----

// The elements that a tile updates where it does so in the order of memory: its own, or as many, but from and to places
// that no 8-bit block and no group of random numbers straddles.
struct Range {
  int64_t begin, end;
};
constexpr int64_t kRangeUnit = 64;
static_assert(kRangeUnit % kBlock8 == 0 && kRangeUnit % kVector == 0, "");

__device__ __forceinline__ Range range_of(const AdafactorRow& by, int64_t numel, int64_t index, const Tile& tile) {
  Range range;
  if (by.cut == Cut::kRectangles) {
    const int64_t share = ((numel + by.tiles - 1) / by.tiles + kRangeUnit - 1) / kRangeUnit * kRangeUnit;
    range = {index * share, (index + 1) * share};
  } else {
    range = {tile.begin / kRangeUnit * kRangeUnit, (tile.begin + tile.elements) / kRangeUnit * kRangeUnit};
    if (index == by.tiles - 1) range.end = numel;
  }
  if (range.begin > numel) range.begin = numel;
  if (range.end > numel) range.end = numel;
  return range;
}

template <class T>
struct Scalars {
  T factor, limit, decay, beta1, into, neg_out;

  __device__ __forceinline__ void set(const AdafactorWork& work) {
    factor = T(work.factor);
    limit = T(work.limit);
    decay = T(work.step.decay);
    beta1 = T(work.step.beta1);
    into = T(work.step.into);
    neg_out = T(work.step.neg_out);
  }

  __device__ __forceinline__ T change(T g, T root) const { return g * factor * root; }

  __device__ __forceinline__ void update(T& p, T change, bool has_moment, T& moment) const {
    if (has_moment) change = moment = Adafactor::first_moment(moment, change, beta1, into);
    Adafactor::apply(p, change, decay, neg_out);
  }
};

// What a block knows of its tile; in shared memory, so that it takes no registers.
struct Job {
  AdafactorArgs tables;
  TensorRow row;
  AdafactorRow by;
  const void* grad;
  Tile tile;
  Lines lines;
  Range range;
  Scalars<float> narrow;
  Scalars<double> wide;
  uint32_t step;
  bool has_moment, skip;
  bool whole;  // every vector of the range, and of every line where lines are whole 8-bit blocks
};

__device__ __forceinline__ void open(const AdafactorArgs& args, const Piece& piece, Job& job) {
  const AdafactorWork& work = args.work[piece.row];
  job.skip = work.skip != 0u;
  if (job.skip) return;
  job.tables = args;
  job.row = args.rows[piece.row].tensor;
  job.by = args.factored[piece.row];
  job.grad = args.grads[piece.row];
  job.tile = tile_of(job.by, job.row.numel, piece.index);
  job.lines = lines_of(job.by, job.tile);
  job.range = range_of(job.by, job.row.numel, piece.index, job.tile);
  job.narrow.set(work);
  job.wide.set(work);
  job.step = uint32_t(work.count);
  job.has_moment = Adafactor::has_moment(work.hyper);
  job.whole = takes_vectors(job.row, job.grad) && (job.range.end - job.range.begin) % kVector == 0;
}

struct Operands {
  Fetched param, grad, moment;
};

template <bool WHOLE>
__device__ __forceinline__ void fetch_all(const Job& job, const Place& at, Operands& to) {
  fetch_param<WHOLE>(job.row, at, to.param);
  fetch_grad<WHOLE>(job.row, job.grad, at, to.grad);
  if (job.has_moment) fetch_state<WHOLE>(job.row, 0, at, to.moment);
}

// From the elements' inverse roots, which are made before anything is fetched: their divisions take registers.
__device__ __forceinline__ void update_place(const Job& job, const Place& at, const float (&root)[kVector]) {
  Operands raw;
  if (job.whole) fetch_all<true>(job, at, raw);
  else fetch_all<false>(job, at, raw);
  float p[kVector], change[kVector], moment[kVector] = {};
  to_float(job.row.grad_format, raw.grad, change);
#pragma unroll
  for (int j = 0; j < kVector; ++j) change[j] = job.narrow.change(change[j], root[j]);
  param_to_float(job.row, raw.param, p);
  if (job.has_moment) state_to_float(job.row, 0, raw.moment, moment);
#pragma unroll
  for (int j = 0; j < kVector; ++j) job.narrow.update(p[j], change[j], job.has_moment, moment[j]);
  round_param(job.row, at, p, job.tables.seed, job.step);
  if (job.has_moment) round_state(job.row, 0, at, moment, job.tables.seed, job.step);
}

__device__ __forceinline__ void update_range(const Job& job) {
  const int n = int(job.range.end - job.range.begin);
  // Every thread makes every round, with nothing to do past the end: lanes meet in shuffles.
  for (int round = 0; round < n; round += kThreads * kVector) {
    const int first = round + int(threadIdx.x) * kVector;
    const Place at = place_of(job.range.begin, first, n - first);
    float root[kVector];
    load_roots(job.tables, job.by, job.narrow.limit, at.begin, at.count, root);
    update_place(job, at, root);
  }
}

__device__ __forceinline__ void update_rectangle(const Job& job) {
  const Columns<float> columns(job.tables, job.by, job.tile, job.narrow.limit);
  const int last = job.lines.count - 1;
  float of_row = columns.row_var[first_line() < last ? first_line() : last];
  for (int line = first_line(); line <= last; line += kWarps) {
    const int left = width_of(job.lines, line) - first_column();
    const Place at = place_of(job.lines.begin + line * job.lines.stride, first_column(), left);
    float root[kVector];
    columns.roots(of_row, root);
    of_row = columns.row_var[line + kWarps < last ? line + kWarps : last];  // is there when the next line needs it
    update_place(job, at, root);
  }
}

__device__ __forceinline__ void update_double(const Job& job) {
  constexpr int V = 2;
  const TensorRow& row = job.row;
  for (int64_t begin = job.range.begin + int64_t(threadIdx.x) * V; begin < job.range.end; begin += kThreads * V) {
    const int count = job.range.end - begin < V ? int(job.range.end - begin) : V;
    double p[V], g[V], moment[V] = {}, root[V];
    load_raw<Reuse::kAgain>(static_cast<const double*>(row.param) + begin, count, p);
    load<Reuse::kOnce>(row.grad_format, job.grad, begin, count, g);
    if (job.has_moment) load_raw<Reuse::kOnce>(static_cast<const double*>(row.state[0]) + begin, count, moment);
    load_roots(job.tables, job.by, job.wide.limit, begin, count, root);
#pragma unroll
    for (int j = 0; j < V; ++j) job.wide.update(p[j], job.wide.change(g[j], root[j]), job.has_moment, moment[j]);
    store_raw<Reuse::kAgain>(static_cast<double*>(row.param) + begin, count, p);
    if (job.has_moment) store_raw<Reuse::kOnce>(static_cast<double*>(row.state[0]) + begin, count, moment);
  }
}

// Blocks per multiprocessor to leave registers for. Of three, some architectures' code spills; their memory needs less under way.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kResident = 2;
#else
constexpr int kResident = 3;
#endif

}  // namespace

// In the opposite order: what was read last may still be in the cache.
__global__ void __launch_bounds__(kThreads, 2) adafactor_norm(AdafactorArgs args) {
  const Piece piece = args.tiles[gridDim.x - 1u - blockIdx.x];
  AdafactorWork& work = args.work[piece.row];
  const AdafactorRow& by = args.factored[piece.row];
  if (work.skip || by.cut == Cut::kElements || !Adafactor::clips(work.hyper)) return;
  const TensorRow& row = args.rows[piece.row].tensor;
  const Tile tile = tile_of(by, row.numel, piece.index);
  const void* grad = args.grads[piece.row];
  double total = row.param_format == kFloat64 ? norm_tile<double>(args, row, by, grad, tile, work)
                                              : norm_tile<float>(args, row, by, grad, tile, work);
  total = join_block(total);
  if (threadIdx.x == 0) at<double>(args, by.update_squares)[piece.index] = total;
  uint32_t* arrived = at<uint32_t>(args, by.arrived);
  if (!is_last(arrived, unsigned(by.tiles))) return;
  total = sum_parts(at<double>(args, by.update_squares), by.tiles);
  if (threadIdx.x != 0) return;
  *arrived = 0u;
  work.step = Adafactor::step(work.hyper, by.shape.flags, work.count, work.rms_param, sqrt(total / double(row.numel)));
}

__global__ void __launch_bounds__(kThreads, kResident) adafactor_apply(AdafactorArgs args) {
  __shared__ Job job;
  if (threadIdx.x == 0) open(args, args.tiles[blockIdx.x], job);
  __syncthreads();
  if (job.skip) return;
  if (job.row.param_format == kFloat64) return update_double(job);
  if (job.by.cut == Cut::kRectangles && job.by.shape.cols % kBlock8 == 0) return update_rectangle(job);
  update_range(job);
}

}  // namespace fused::cuda

// Adafactor's passes for one instruction set; adafactor.cpp says in which order. Included by kernels.cpp alone.
//
//   stats    sums of p^2 and, by row and column, of g^2 over one tile; of whole matrices, and where a tensor is not
//            factored, also the averages and the sum of the squared updates
//   combine  of divided matrices: sums of several tiles -> averaged rows, averaged columns
//   norm     of divided matrices: sum of the squared updates over one chunk
//   apply    the parameters of a range
#pragma once

#include <algorithm>
#include <cstring>

#include "adafactor.h"
#include "adafactor_small.h"
#include "adafactor_sums.h"
#include "ahead.h"

namespace fused {
namespace FUSED_ISA {
namespace {

// ---- sums by row and column ----

// Sums of g^2 over `lines` stretches of `width` elements, `stride` apart, from element `begin` on: one per line, added to
// `row_sums` or put there, and one per column in `col_sums`. Returns the sum of p^2.
template <class T>
double sum_tile(const AdafactorJob& job, int64_t begin, int64_t lines, int64_t width, int64_t stride, double* row_sums,
                int64_t row_stride, bool add, double* __restrict col_sums) {
  constexpr int64_t kLines = AdafactorTiling::kLines;
  alignas(64) T grad[kBlock];
  alignas(64) T param[kBlock];
  alignas(64) T col[AdafactorTiling::kWidth];
  const T factor = gradient_factor<T>(job);
  const int64_t together = stride == width ? std::max<int64_t>(1, kBlock / width) : 1;  // whole lines in one block
  double param_sum = 0.0;
  std::fill_n(col_sums, width, 0.0);
  for (int64_t first = 0; first < lines; first += kLines) {
    // Few enough lines for float32 to lose nothing that matters; the rest is added in float64.
    const int64_t last = std::min(lines, first + kLines);
    std::fill_n(col, width, T(0));
    for (int64_t line = first; line < last; line += together) {
      const int64_t count = std::min(together, last - line);
      for (int64_t c = 0; c < width; c += kBlock) {
        const int64_t n = std::min(kBlock, width - c), at = begin + line * stride + c;
        const T* block = load(job.row->grad_format, job.row->grad, at, n * count, grad);
        for (int64_t i = 0; i < count; ++i) {
          const T* __restrict g = block + i * width;
          T* __restrict to = col + c;
          const double sum = sum_of<T>(n, [=](int64_t k) {
            const T x = g[k] * factor;
            const T square = x * x;
            to[k] += square;
            return square;
          });
          double& row_sum = row_sums[(line + i) * row_stride];
          row_sum = c == 0 && !add ? sum : row_sum + sum;
        }
        param_sum += sum_param_squares<T>(job, at, n * count, param);
      }
    }
    for (int64_t c = 0; c < width; ++c) col_sums[c] += double(col[c]);
  }
  return param_sum;
}

// Averages rows [begin, end) of matrix `m`, whose sums lie in `parts` places per row. Returns the sum of the averages.
template <class T>
double finish_rows(const AdafactorJob& job, int64_t m, int64_t begin, int64_t end, const double* sums, int64_t parts) {
  T* var = static_cast<T*>(job.factored->row_var) + m * job.factored->rows;
  const T weight = T(job.moments.weight);
  const double cols = double(job.factored->cols);
  double total = 0.0;
  for (int64_t r = begin; r < end; ++r) {
    double sum = 0.0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[r * parts + part];
    var[r] = lerp(var[r], T(sum / cols + job.moments.added), weight);
    total += double(var[r]);
  }
  return total;
}

// Averages columns [begin, end) of matrix `m`, whose sums lie in `parts` rows, and leaves their factors.
template <class T>
void finish_cols(const AdafactorJob& job, int64_t m, int64_t begin, int64_t end, const double* sums, int64_t parts) {
  const int64_t cols = job.factored->cols;
  T* __restrict var = static_cast<T*>(job.factored->col_var) + m * cols;
  T* __restrict factor = static_cast<T*>(job.col_factor) + m * cols;
  const T weight = T(job.moments.weight);
  const double rows = double(job.factored->rows), added = job.moments.added;
  double total[256];
  for (int64_t first = begin; first < end; first += 256) {
    const int64_t n = std::min<int64_t>(256, end - first);
    std::fill_n(total, n, 0.0);
    for (int64_t part = 0; part < parts; ++part) {
      const double* __restrict from = sums + part * cols + first;
      for (int64_t i = 0; i < n; ++i) total[i] += from[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      const T averaged = lerp(var[first + i], T(total[i] / rows + added), weight);
      var[first + i] = averaged;
      factor[first + i] = Adafactor::inverse_root(averaged);
    }
  }
}

// ---- inverse roots of the second moment, and the sum of squared updates ----

template <class T>
void fill_roots(const AdafactorJob& job, int64_t begin, int64_t n, T* __restrict out) {
  const T limit = T(job.moments.limit);
  if (!job.tiling.factored) {
    const T* __restrict var = static_cast<const T*>(job.factored->variance) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = Adafactor::bounded(Adafactor::inverse_root(var[i]), limit);
    return;
  }
  const int64_t rows = job.factored->rows, cols = job.factored->cols;
  const T* row_var = static_cast<const T*>(job.factored->row_var);
  int64_t line = begin / cols, c = begin % cols, m = line / rows, next = (m + 1) * rows;
  const T* col_factor = static_cast<const T*>(job.col_factor) + m * cols;
  T mean = T(job.mean[m]);
  for (int64_t i = 0; i < n; ++line) {
    if (line == next) {
      mean = T(job.mean[++m]);
      next += rows;
      col_factor += cols;
    }
    const T row_factor = Adafactor::row_factor(mean, row_var[line]);
    const T* __restrict factor = col_factor + c;
    const int64_t count = std::min(cols - c, n - i);
    for (int64_t k = 0; k < count; ++k) out[i + k] = Adafactor::bounded(row_factor * factor[k], limit);
    i += count;
    c = 0;
  }
}

// Room for the roots of a block: with those of the whole matrices that it touches, where matrices are small.
constexpr int64_t kRoots = kBlock + 2 * AdafactorTiling::kSmall;

// The inverse roots of the second moments of elements [begin, begin + n), somewhere in `buffer`.
template <class T>
const T* roots_of(const AdafactorJob& job, int64_t begin, int64_t n, T* buffer) {
  if (job.tiling.small) return small_roots<T>(job, begin, n, buffer);
  fill_roots<T>(job, begin, n, buffer);
  return buffer;
}

template <class T>
double sum_update_squares(const AdafactorJob& job, int64_t begin, int64_t end) {
  alignas(64) T buffer[kBlock];
  alignas(64) T root[kBlock];
  const T factor = gradient_factor<T>(job);
  double total = 0.0;
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t n = std::min(kBlock, end - b);
    fill_roots<T>(job, b, n, root);
    const T* __restrict g = load(job.row->grad_format, job.row->grad, b, n, buffer);
    const T* __restrict x = root;
    total += sum_of<T>(n, [=](int64_t i) {
      const T update = g[i] * factor * x[i];
      return update * update;
    });
  }
  return total;
}

// ---- stats and combine ----

template <class T>
void whole_matrices(const AdafactorJob& job, int64_t tile, double* scratch) {
  const FactoredRow& shape = *job.factored;
  double* row_sums = scratch;
  double* col_sums = scratch + shape.rows;
  const int64_t size = shape.rows * shape.cols;
  const int64_t first = tile * job.tiling.group, last = std::min(shape.lead, first + job.tiling.group);
  double param_sum = 0.0;
  for (int64_t m = first; m < last; ++m) {
    const int64_t begin = m * size;
    for (int64_t c = 0; c < shape.cols; c += AdafactorTiling::kWidth)
      param_sum += sum_tile<T>(job, begin + c, shape.rows, std::min(AdafactorTiling::kWidth, shape.cols - c), shape.cols,
                               row_sums, 1, c > 0, col_sums + c);
    const double total = finish_rows<T>(job, m, 0, shape.rows, row_sums, 1);
    finish_cols<T>(job, m, 0, shape.cols, col_sums, 1);
    job.mean[m] = max_nan(total / double(shape.rows), job.moments.least_mean);
  }
  job.param_squares[tile] = param_sum;
  job.update_squares[tile] = Adafactor::clips(job.group->hyper) ? sum_update_squares<T>(job, first * size, last * size) : 0.0;
}

template <class T>
void divided_matrix(const AdafactorJob& job, int64_t tile) {
  const FactoredRow& shape = *job.factored;
  const AdafactorTiling& by = job.tiling;
  const int64_t m = tile / (by.row_tiles * by.col_tiles);
  const int64_t row_tile = tile / by.col_tiles % by.row_tiles, col_tile = tile % by.col_tiles;
  const int64_t line = row_tile * by.lines, c = col_tile * by.width;
  const int64_t row = m * shape.rows + line;
  job.param_squares[tile] =
      sum_tile<T>(job, row * shape.cols + c, std::min(by.lines, shape.rows - line), std::min(by.width, shape.cols - c),
                  shape.cols, job.row_part + row * by.col_tiles + col_tile, by.col_tiles, false,
                  job.col_part + (m * by.row_tiles + row_tile) * shape.cols + c);
}

// A tensor without factors: one element's variance after the other.
template <class T>
void unfactored(const AdafactorJob& job, int64_t tile) {
  alignas(64) T buffer[kBlock];
  const int64_t from = tile * AdafactorTiling::kElements;
  const int64_t to = std::min(job.row->numel, from + AdafactorTiling::kElements);
  const T factor = gradient_factor<T>(job), weight = T(job.moments.weight), added = T(job.moments.added);
  const T limit = T(job.moments.limit);
  double param_sum = 0.0, update_sum = 0.0;
  for (int64_t b = from; b < to; b += kBlock) {
    const int64_t n = std::min(kBlock, to - b);
    const T* __restrict g = load(job.row->grad_format, job.row->grad, b, n, buffer);
    T* __restrict var = static_cast<T*>(job.factored->variance) + b;
    update_sum += sum_of<T>(n, [=](int64_t i) {
      const T x = g[i] * factor;
      var[i] = lerp(var[i], x * x + added, weight);
      const T update = x * Adafactor::bounded(Adafactor::inverse_root(var[i]), limit);
      return update * update;
    });
    param_sum += sum_param_squares<T>(job, b, n, buffer);
  }
  job.param_squares[tile] = param_sum;
  job.update_squares[tile] = update_sum;
}

template <class T>
void stats_as(const AdafactorJob& job, int64_t tile, double* scratch) {
  if (!job.tiling.factored) return unfactored<T>(job, tile);
  if (job.tiling.small) return small_matrices<T>(job, tile);
  if (job.tiling.group > 0) return whole_matrices<T>(job, tile, scratch);
  divided_matrix<T>(job, tile);
}

template <class T>
void combine_as(const AdafactorJob& job, int64_t unit) {
  const FactoredRow& shape = *job.factored;
  const AdafactorTiling& by = job.tiling;
  const int64_t m = unit / (by.row_units + by.col_units), within = unit % (by.row_units + by.col_units);
  const int64_t begin = (within < by.row_units ? within : within - by.row_units) * AdafactorTiling::kUnit;
  if (within < by.row_units) {
    job.mean_part[m * by.row_units + within] =
        finish_rows<T>(job, m, begin, std::min(shape.rows, begin + AdafactorTiling::kUnit),
                       job.row_part + m * shape.rows * by.col_tiles, by.col_tiles);
  } else {
    finish_cols<T>(job, m, begin, std::min(shape.cols, begin + AdafactorTiling::kUnit),
                   job.col_part + m * by.row_tiles * shape.cols, by.row_tiles);
  }
}

// ---- updates ----

template <class T>
void norm_as(const AdafactorJob& job, int64_t chunk) {
  job.update_squares[chunk] = sum_update_squares<T>(job, chunk * kChunk, std::min(job.row->numel, (chunk + 1) * kChunk));
}

template <class T>
void apply_block(const AdafactorJob& job, int64_t n, T* __restrict p, const T* __restrict g, const T* __restrict root,
                 T* __restrict moment) {
  const T factor = gradient_factor<T>(job), decay = T(job.step.decay), neg_out = T(job.step.neg_out);
  const T beta1 = T(job.step.beta1), into = T(job.step.into);
  if (moment == nullptr) {
    for (int64_t i = 0; i < n; ++i) Adafactor::apply(p[i], g[i] * factor * root[i], decay, neg_out);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const T averaged = Adafactor::first_moment(moment[i], g[i] * factor * root[i], beta1, into);
    moment[i] = averaged;
    Adafactor::apply(p[i], averaged, decay, neg_out);
  }
}

template <class T>
void apply_as(const AdafactorJob& job, int64_t begin, int64_t end) {
  Buffers<T> buffer;
  alignas(64) T room[kRoots];
  const TensorRow& row = *job.row;
  const bool has_moment = Adafactor::has_moment(job.group->hyper);
  for (int64_t b = begin; b < end; b += kBlock) {
    const int64_t n = std::min(kBlock, end - b);
    Ahead ahead(row, b + n, std::min(kBlock, end - b - n), 2);
    ahead.fetch();
    const T* root = roots_of<T>(job, b, n, room);
    ahead.fetch();
    const T* g = load(row.grad_format, row.grad, b, n, buffer.grad);
    T* p = const_cast<T*>(load_param_as<T>(row, b, n, buffer.param));
    if constexpr (sizeof(T) == 8) {
      apply_block<T>(job, n, p, g, root, has_moment ? static_cast<T*>(row.state[0]) + b : nullptr);
    } else {
      float* moment = has_moment ? const_cast<float*>(load_state(row, 0, b, n, buffer.state[0])) : nullptr;
      apply_block<float>(job, n, p, g, root, moment);
      store_param(row, b, n, p, random_for(row, -1, job.context, b, n, buffer.random));
      if (!has_moment) continue;
      store_state(row, 0, b, n, moment, random_for(row, 0, job.context, b, n, buffer.random), uint32_t(job.context.step));
    }
  }
}

void adafactor_stats(const AdafactorJob& job, int64_t tile, double* scratch) {
  job.wide ? stats_as<double>(job, tile, scratch) : stats_as<float>(job, tile, scratch);
}

void adafactor_combine(const AdafactorJob& job, int64_t unit) {
  job.wide ? combine_as<double>(job, unit) : combine_as<float>(job, unit);
}

void adafactor_norm(const AdafactorJob& job, int64_t chunk) {
  job.wide ? norm_as<double>(job, chunk) : norm_as<float>(job, chunk);
}

void adafactor_apply(const AdafactorJob& job, int64_t begin, int64_t end) {
  job.wide ? apply_as<double>(job, begin, end) : apply_as<float>(job, begin, end);
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused

// Adafactor over tensors of many small matrices, the kernels of a convolution for instance: a batch of them at a time, each
// in its own lane. Which element, row or column is a loop around the lanes, so every shape is vectorized, and what a matrix
// would cost beside its elements is shared by the batch. Included by adafactor_kernels.h alone.
//
// Factors are computed again where they are used: that is cheaper than keeping one number per row and column of millions of
// matrices, and gives the same bits.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "adafactor.h"
#include "adafactor_sums.h"
#include "ahead.h"

namespace fused {
namespace FUSED_ISA {
namespace {

// Squares of 4 x 4 over `count` lanes of n elements each: square(lane, element) for each of them; where n is less than 4 they
// reach into the next lane. Returns the lanes that they cover.
template <class Square>
int64_t for_squares(int64_t n, int64_t count, Square square) {
  int64_t l = 0;
  for (; l + 4 <= count && (l + 3) * n + 4 <= count * n; l += 4)
    for (int64_t k = 0; k < n; k += 4) square(l, std::max<int64_t>(0, std::min(k, n - 4)));  // the last over the one before
  return l;
}

#if defined(__SSE2__)
// Transposes a square of which the first `in_lines` lines are there to be read, and the first `out_lines` to be written.
inline void transpose(const float* in, int64_t in_apart, int64_t in_lines, float* out, int64_t out_apart, int64_t out_lines) {
  __m128 x0 = _mm_loadu_ps(in), x1 = _mm_loadu_ps(in + in_apart);
  __m128 x2 = in_lines > 2 ? _mm_loadu_ps(in + 2 * in_apart) : x0, x3 = in_lines > 3 ? _mm_loadu_ps(in + 3 * in_apart) : x0;
  _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
  _mm_storeu_ps(out, x0);
  _mm_storeu_ps(out + out_apart, x1);
  if (out_lines > 2) _mm_storeu_ps(out + 2 * out_apart, x2);
  if (out_lines > 3) _mm_storeu_ps(out + 3 * out_apart, x3);
}
#endif

// values[k * lanes + l] = from[l * n + k] in the first `count` lanes, 0 in the others.
template <class T>
void to_lanes(const T* __restrict from, int64_t n, int64_t count, int64_t lanes, T* __restrict values) {
  int64_t l = 0;
  if (n == 1) l = std::copy_n(from, count, values) - values;
#if defined(__SSE2__)
  if constexpr (sizeof(T) == 4) {
    if (n > 1)
      l = for_squares(n, count, [=](int64_t lane, int64_t k) {
        transpose(from + lane * n + k, n, 4, values + k * lanes + lane, lanes, n);
      });
  }
#endif
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t i = l; i < count; ++i) values[k * lanes + i] = from[i * n + k];
    for (int64_t i = count; i < lanes; ++i) values[k * lanes + i] = T(0);
  }
}

// The way back.
template <class T>
void from_lanes(const T* __restrict values, int64_t n, int64_t count, int64_t lanes, T* __restrict to) {
  int64_t l = 0;
  if (n == 1) l = std::copy_n(values, count, to) - to;
#if defined(__SSE2__)
  if constexpr (sizeof(T) == 4) {
    if (n > 1)  // what reaches into the next lane is overwritten by it
      l = for_squares(n, count, [=](int64_t lane, int64_t k) {
        transpose(values + k * lanes + lane, lanes, n, to + lane * n + k, n, 4);
      });
  }
#endif
  for (int64_t k = 0; k < n; ++k)
    for (int64_t i = l; i < count; ++i) to[i * n + k] = values[k * lanes + i];
}

// Matrices [first, first + count) of a tensor in lanes: averages or factors of rows and columns, and one number per element.
template <class T>
class SmallMatrices {
 public:
  static constexpr int64_t kRegister = 8;                                    // lanes are a multiple of it
  static constexpr int64_t kElements = AdafactorTiling::kSmall * kSumLanes;  // in all lanes, at most
  static_assert(kElements >= kBlock + (2 + kRegister) * AdafactorTiling::kSmall, "a block and the matrices at its ends");

  // As many as make a block; of larger matrices as many as fill registers.
  static int64_t at_once(int64_t size) { return std::max<int64_t>(kBlock / size / kSumLanes * kSumLanes, kSumLanes); }

  SmallMatrices(const AdafactorJob& job, int64_t first, int64_t count)
      : job_(job), first_(first), count_(count), lanes_((count + kRegister - 1) / kRegister * kRegister),
        rows_(job.factored->rows), cols_(job.factored->cols) {
    to_lanes(row_var(), rows_, count_, lanes_, row_);
    to_lanes(col_var(), cols_, count_, lanes_, col_);
    prefetch_bytes(row_var() + rows_ * count, rows_ * count * int64_t(sizeof(T)));
    prefetch_bytes(col_var() + cols_ * count, cols_ * count * int64_t(sizeof(T)));
  }

  // Takes the gradient into the averages.
  void average(const T* __restrict grad) {
    const T factor = gradient_factor<T>(job_);
    // One element after the other first: that is how memory is read fast. Matrices of one element are in lanes then.
    const int64_t size = rows_ * cols_;
    T* __restrict scaled = size == 1 ? element_ : scaled_;
    for (int64_t i = 0; i < size * count_; ++i) scaled[i] = grad[i] * factor;
    if (size == 1) std::fill(element_ + count_, element_ + lanes_, T(0));
    else to_lanes(scaled_, size, count_, lanes_, element_);
    average(rows_, cols_, cols_, 1, row_);
    average(cols_, 1, rows_, cols_, col_);
    from_lanes(row_, rows_, count_, lanes_, row_var());
    from_lanes(col_, cols_, count_, lanes_, col_var());
  }

  // Makes factors of the averages.
  void factor() {
    const int64_t lanes = lanes_;
    const double share = 1.0 / double(rows_), least = job_.moments.least_mean;
    double* __restrict sum = sum_;
    T* __restrict mean = mean_;
    for (int64_t l = 0; l < lanes; ++l) sum[l] = double(row_[l]);
    for (int64_t r = 1; r < rows_; ++r) {
      const T* __restrict row = row_ + r * lanes;
      for (int64_t l = 0; l < lanes; ++l) sum[l] += double(row[l]);
    }
    for (int64_t l = 0; l < lanes; ++l) mean[l] = T(max_nan(sum[l] * share, least));
    for (int64_t r = 0; r < rows_; ++r) {
      T* __restrict row = row_ + r * lanes;
      for (int64_t l = 0; l < lanes; ++l) row[l] = Adafactor::row_factor(mean[l], row[l]);
    }
    for (int64_t i = 0; i < cols_ * lanes; ++i) col_[i] = Adafactor::inverse_root(col_[i]);
  }

  // After `average` and `factor`: the sum of the squared updates.
  double update_squares() {
    const int64_t lanes = lanes_;
    const T limit = T(job_.moments.limit);
    for (int64_t r = 0; r < rows_; ++r) {
      const T* __restrict row = row_ + r * lanes;
      const T* __restrict col = col_;
      const T* __restrict x = element_ + r * cols_ * lanes;
      sum_terms(cols_, r > 0, [=](int64_t c, int64_t l) {
        const T update = x[c * lanes + l] * Adafactor::bounded(row[l] * col[c * lanes + l], limit);
        return update * update;
      });
    }
    return sum_of<double>(count_, [this](int64_t l) { return sum_[l]; });
  }

  // After `factor`: the inverse root of every element's second moment.
  void roots(T* out) {
    const int64_t lanes = lanes_;
    const T limit = T(job_.moments.limit);
    for (int64_t r = 0; r < rows_; ++r) {
      const T* __restrict row = row_ + r * lanes;
      for (int64_t c = 0; c < cols_; ++c) {
        const T* __restrict col = col_ + c * lanes;
        T* __restrict root = element_ + (r * cols_ + c) * lanes;
        for (int64_t l = 0; l < lanes; ++l) root[l] = Adafactor::bounded(row[l] * col[l], limit);
      }
    }
    from_lanes(element_, rows_ * cols_, count_, lanes, out);
  }

 private:
  T* row_var() const { return static_cast<T*>(job_.factored->row_var) + first_ * rows_; }
  T* col_var() const { return static_cast<T*>(job_.factored->col_var) + first_ * cols_; }

  // Averages `n` rows or columns, `apart` elements apart, to each of which belong `inner` elements, `step` apart.
  void average(int64_t n, int64_t apart, int64_t inner, int64_t step, T* averages) {
    const int64_t lanes = lanes_;
    const T weight = T(job_.moments.weight);
    const double share = 1.0 / double(inner), added = job_.moments.added;
    for (int64_t k = 0; k < n; ++k) {
      const T* __restrict x = element_ + k * apart * lanes;
      sum_terms(inner, false, [=](int64_t i, int64_t l) { return x[i * step * lanes + l] * x[i * step * lanes + l]; });
      T* __restrict to = averages + k * lanes;
      for (int64_t l = 0; l < lanes; ++l) to[l] = lerp(to[l], T(sum_[l] * share + added), weight);
    }
  }

  // The sums of term(i, lane) over i in [0, n), n > 0, by lane; added to what is there with `add`. Four terms at a time in T
  // lose nothing that matters.
  template <class Term>
  void sum_terms(int64_t n, bool add, Term term) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4, add = true) sum_some<4>(i, add, term);
    if (n - i == 3) sum_some<3>(i, add, term);
    if (n - i == 2) sum_some<2>(i, add, term);
    if (n - i == 1) sum_some<1>(i, add, term);
  }

  template <int kTerms, class Term>
  void sum_some(int64_t i, bool add, Term term) {
    const int64_t lanes = lanes_;
    double* __restrict sum = sum_;
    const auto some = [i, term](int64_t l) {
      T part = term(i, l);
      for (int j = 1; j < kTerms; ++j) part += term(i + j, l);
      return double(part);
    };
    if (add)
      for (int64_t l = 0; l < lanes; ++l) sum[l] += some(l);
    else
      for (int64_t l = 0; l < lanes; ++l) sum[l] = some(l);
  }

  const AdafactorJob& job_;
  const int64_t first_, count_, lanes_, rows_, cols_;
  alignas(64) T scaled_[kElements];
  alignas(64) T element_[kElements];
  alignas(64) T row_[kElements];
  alignas(64) T col_[kElements];
  alignas(64) T mean_[kBlock + kSumLanes];
  alignas(64) double sum_[kBlock + kSumLanes];
};

// `stats` of a tile of small matrices.
template <class T>
void small_matrices(const AdafactorJob& job, int64_t tile) {
  alignas(64) T buffer[SmallMatrices<T>::kElements];
  const bool clips = Adafactor::clips(job.group->hyper);
  const int64_t size = job.factored->rows * job.factored->cols, at_once = SmallMatrices<T>::at_once(size);
  const int64_t first = tile * job.tiling.group, last = std::min(job.factored->lead, first + job.tiling.group);
  double param_sum = 0.0, update_sum = 0.0;
  for (int64_t m = first; m < last; m += at_once) {
    const int64_t count = std::min(at_once, last - m);
    Ahead ahead(*job.row, (m + count) * size, std::min(at_once, last - m - count) * size, 3);
    SmallMatrices<T> matrices(job, m, count);
    ahead.fetch();
    matrices.average(load(job.row->grad_format, job.row->grad, m * size, count * size, buffer));
    ahead.fetch();
    if (clips) {
      matrices.factor();
      update_sum += matrices.update_squares();
    }
    ahead.fetch();
    param_sum += sum_param_squares<T>(job, m * size, count * size, buffer);
  }
  job.param_squares[tile] = param_sum;
  job.update_squares[tile] = update_sum;
}

// The inverse roots of the second moments of elements [begin, begin + n), somewhere in `buffer`. n: a block at most.
template <class T>
const T* small_roots(const AdafactorJob& job, int64_t begin, int64_t n, T* buffer) {
  const int64_t size = job.factored->rows * job.factored->cols, first = begin / size;
  SmallMatrices<T> matrices(job, first, (begin + n - 1) / size + 1 - first);
  matrices.factor();
  matrices.roots(buffer);
  return buffer + (begin - first * size);
}

}  // namespace
}  // namespace FUSED_ISA
}  // namespace fused

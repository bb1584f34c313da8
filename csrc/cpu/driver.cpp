#include "driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../prefetch.h"
#include "../prologue.h"
#include "kernels.h"

namespace fused {

#define X(isa) namespace isa { extern const Kernels kernels; }
FUSED_ISA_LIST  // the instruction sets that were built, in rising order
#undef X

namespace {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t kElementsPerThread = 32768;
// What a tensor costs beside its elements, in elements.
constexpr int64_t kRowCost = 48;
// How many rows before its use a step count is fetched: each lies in memory of its own.
constexpr size_t kRowsAhead = 8;

#if defined(__x86_64__)
// Conversions of float16 in hardware. Older compilers' __builtin_cpu_supports does not know the name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

bool supported(const char* name) {
#if defined(__x86_64__)
  const std::string isa = name;
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (isa == "avx2") return avx2;
  if (isa == "avx512")
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return std::string(name) == "baseline";
}

const Kernels* find(const std::string& name) {
  const Kernels* best = nullptr;
#define X(isa) \
  if (supported(#isa) && (name.empty() || name == #isa)) best = &isa::kernels;
  FUSED_ISA_LIST  // in rising order: the last one supported wins
#undef X
  return best;
}

const Kernels* initial() {
  const char* wanted = std::getenv("FUSED_ISA");
  const Kernels* kernels = find(wanted != nullptr ? wanted : "");
  return kernels != nullptr ? kernels : find("");
}

const Kernels* active = initial();

// A piece of one tensor: elements [begin, end).
struct Piece {
  size_t row;
  int64_t begin, end;
};

// Splits the rows with a gradient evenly between as many threads as are worth their while, at multiples of kChunk within
// a tensor.
class Partition {
 public:
  explicit Partition(const std::vector<TensorRow>& rows) : rows_(rows), ends_(rows.size()) {
    int64_t total = 0;
    for (size_t r = 0; r < rows.size(); ++r) ends_[r] = total += cost(rows[r]);
    total_ = total;
    threads_ = threads_for(total);
  }

  int threads() const { return threads_; }

  template <class Body>
  void for_each(int thread, Body body) const {
    const int64_t from = bound(thread), to = bound(thread + 1);
    size_t r = size_t(std::upper_bound(ends_.begin(), ends_.end(), from) - ends_.begin());
    for (int64_t position = r == 0 ? 0 : ends_[r - 1]; r < rows_.size() && position < to; position = ends_[r++]) {
      const TensorRow& row = rows_[r];
      if (r + 1 < rows_.size()) prefetch(rows_[r + 1]);
      const int64_t begin = element(row, from - position), end = element(row, to - position);
      if (ends_[r] > position && begin < end) body(Piece{r, begin, end});
    }
  }

 private:
  static int64_t cost(const TensorRow& row) { return row.grad == nullptr || row.numel == 0 ? 0 : row.numel + kRowCost; }
  int64_t bound(int thread) const { return thread == threads_ ? total_ : total_ / threads_ * thread; }

  static int64_t element(const TensorRow& row, int64_t offset) {
    if (offset <= 0) return 0;
    if (offset >= row.numel) return row.numel;
    return std::min(row.numel, (offset + kChunk / 2) / kChunk * kChunk);
  }

  // Small tensors end before the processor has seen a pattern in their addresses.
  static void prefetch(const TensorRow& row) {
    fused::prefetch(row.grad);
    fused::prefetch(row.param);
    for (const void* state : row.state) fused::prefetch(state);
  }

  const std::vector<TensorRow>& rows_;
  std::vector<int64_t> ends_;  // the cost of all rows up to and with this one
  int threads_;
  int64_t total_;
};

template <class Body>
void parallel(int threads, Body body) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      // A dynamic environment may hand out fewer threads than asked for: each then plays several parts.
      for (int part = omp_get_thread_num(); part < threads; part += omp_get_num_threads()) body(part);
    }
    return;
  }
#endif
  for (int part = 0; part < threads; ++part) body(part);
}

}  // namespace

const char* isa() { return active->name; }

void select_isa(const std::string& name) {
  const Kernels* kernels = find(name);
  if (kernels == nullptr) throw std::invalid_argument("instruction set '" + name + "' is not built or not supported here");
  active = kernels;
}

int max_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

const Kernels& active_kernels() { return *active; }

int threads_for(int64_t elements) {
  return int(std::max<int64_t>(1, std::min<int64_t>(max_threads(), elements / kElementsPerThread)));
}

void reduce(const std::vector<TensorRow>& rows, bool maximum, double* row_values, double* total) {
  std::vector<size_t> first(rows.size() + 1, 0);
  for (size_t r = 0; r < rows.size(); ++r)
    first[r + 1] = first[r] + (rows[r].grad == nullptr ? 0 : size_t((rows[r].numel + kChunk - 1) / kChunk));
  std::vector<Reduction> partial(first.back());

  const Partition partition(rows);
  parallel(partition.threads(), [&](int thread) {
    partition.for_each(thread, [&](const Piece& piece) {
      for (int64_t begin = piece.begin; begin < piece.end; begin += kChunk)
        partial[first[piece.row] + size_t(begin / kChunk)] =
            active->reduce(rows[piece.row], begin, std::min(begin + kChunk, piece.end), maximum);
    });
  });

  double value = 0.0, nonfinite = 0.0;
  for (size_t r = 0; r < rows.size(); ++r) {
    double row_value = 0.0;
    bool row_nonfinite = false;
    for (size_t i = first[r]; i < first[r + 1]; ++i) {
      row_value = maximum ? max_nan(partial[i].value, row_value) : row_value + partial[i].value;
      row_nonfinite |= partial[i].nonfinite;
    }
    value = maximum ? max_nan(row_value, value) : value + row_value;
    nonfinite += row_nonfinite;
    if (row_values != nullptr) {
      row_values[2 * r] = row_value;
      row_values[2 * r + 1] = row_nonfinite;
    }
  }
  total[0] = value;
  total[1] = nonfinite;
}

bool scale(const std::vector<TensorRow>& rows, double factor) {
  std::atomic<bool> nonfinite{false};
  const Partition partition(rows);
  parallel(partition.threads(), [&](int thread) {
    bool found = false;
    partition.for_each(thread, [&](const Piece& p) { found |= active->scale(rows[p.row], p.begin, p.end, factor); });
    if (found) nonfinite = true;
  });
  return nonfinite;
}

void clamp(const std::vector<TensorRow>& rows, double limit) {
  const Partition partition(rows);
  parallel(partition.threads(), [&](int thread) {
    partition.for_each(thread, [&](const Piece& p) { active->clamp(rows[p.row], p.begin, p.end, limit); });
  });
}

void accumulate(const std::vector<TensorRow>& rows, const std::vector<uint8_t>& overwrite) {
  const Partition partition(rows);
  parallel(partition.threads(), [&](int thread) {
    partition.for_each(thread, [&](const Piece& p) { active->accumulate(rows[p.row], p.begin, p.end, overwrite[p.row] != 0); });
  });
}

void update(const std::vector<TensorRow>& rows, const std::vector<GroupRow>& groups, const StepControl& control) {
  const StepDecision decision = decide(control);
  if (decision.skip) return;
  for (size_t r = 0; r < rows.size(); ++r) {
    if (r + kRowsAhead < rows.size()) prefetch(rows[r + kRowsAhead].step);
    if (rows[r].grad != nullptr && rows[r].step != nullptr) *rows[r].step += 1.0f;
  }

  const Partition partition(rows);
  parallel(partition.threads(), [&](int thread) {
    ConstantsCache constants;
    partition.for_each(thread, [&](const Piece& piece) {
      const TensorRow& row = rows[piece.row];
      // A rule without a count has history: "not the first step".
      const double step = row.step != nullptr ? double(*row.step) : 2.0;
      active->update(row, groups[size_t(row.group)], piece.begin, piece.end, {step, decision.grad_factor, control.seed, &constants});
    });
  });
}

}  // namespace fused

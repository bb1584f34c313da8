#include "adafactor.h"

#include <algorithm>
#include <cmath>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../prologue.h"
#include "driver.h"

namespace fused {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

double sum(const double* values, int64_t n) {
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) total += values[i];
  return total;
}

// Tensors up to this many elements are taken through all passes by one thread, while they are in its own cache ...
constexpr int64_t kHotElements = 131072;
// ... or, where there are enough others for the other threads, while they are in the shared one.
constexpr int64_t kWarmElements = 1 << 21;
constexpr int64_t kTensorsPerThread = 8;
// Chunks of a divided tensor, and elements of small tensors, that a thread takes at a time.
constexpr int64_t kSpan = 8;
constexpr int64_t kBundle = 32768;

// A piece of work: of one divided tensor, or of several small ones from `first` to `last`.
struct Piece {
  AdafactorJob* job;
  int64_t first, last;
};

std::vector<Piece> pieces_of(const std::vector<AdafactorJob*>& jobs, int64_t AdafactorTiling::* count, int64_t at_once) {
  std::vector<Piece> pieces;
  for (AdafactorJob* job : jobs)
    for (int64_t i = 0; i < job->tiling.*count; i += at_once)
      pieces.push_back({job, i, std::min(i + at_once, job->tiling.*count)});
  return pieces;
}

// Doubles that a thread needs beside the workspace, for sums of one whole matrix.
int64_t scratch_of(const AdafactorJob& job) {
  return job.tiling.group > 0 && !job.tiling.small ? job.factored->rows + job.factored->cols : 0;
}

void apply_chunks(const AdafactorKernels& kernels, const AdafactorJob& job, int64_t first, int64_t last) {
  kernels.apply(job, first * kChunk, std::min(last * kChunk, job.row->numel));
}

bool needs_norm(const AdafactorJob& job) { return job.tiling.divided() && Adafactor::clips(job.group->hyper); }

// Every pass over one tensor.
void whole_step(const AdafactorKernels& kernels, AdafactorJob& job, double* scratch) {
  const AdafactorTiling& tiling = job.tiling;
  for (int64_t i = 0; i < tiling.tiles; ++i) kernels.stats(job, i, scratch);
  for (int64_t i = 0; i < tiling.units; ++i) kernels.combine(job, i);
  job.finish_means();
  if (needs_norm(job))
    for (int64_t i = 0; i < tiling.chunks; ++i) kernels.norm(job, i);
  job.finish_step();
  apply_chunks(kernels, job, 0, tiling.chunks);
}

int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace

AdafactorTiling::AdafactorTiling(const TensorRow& row, const FactoredRow& f)
    : factored(f.row_var != nullptr), small(factored && f.rows * f.cols <= kSmall && f.lead >= kFew), group(0), width(0),
      lines(0), col_tiles(0), row_tiles(0), row_units(0), col_units(0),
      tiles(ceil_div(row.numel, kElements)), chunks(ceil_div(row.numel, kChunk)), units(0) {
  if (!factored) return;
  if (f.rows * f.cols <= kElements) {
    group = std::max<int64_t>(1, kElements / (f.rows * f.cols));
    tiles = ceil_div(f.lead, group);
    return;
  }
  width = std::min(f.cols, kWidth);
  lines = std::min(f.rows, std::max(kLines, kElements / width));
  col_tiles = ceil_div(f.cols, width);
  row_tiles = ceil_div(f.rows, lines);
  row_units = ceil_div(f.rows, kUnit);
  col_units = ceil_div(f.cols, kUnit);
  tiles = f.lead * row_tiles * col_tiles;
  units = f.lead * (row_units + col_units);
}

AdafactorJob::AdafactorJob(const TensorRow& tensor, const FactoredRow& shape, const GroupRow& params, const UpdateContext& when)
    : row(&tensor), factored(&shape), group(&params), context(when), tiling(tensor, shape),
      moments(Adafactor::moments(params.hyper, shape.flags, when.step, tensor.param_format == kFloat64)), step(),
      wide(tensor.param_format == kFloat64), param_squares(nullptr), update_squares(nullptr), mean(nullptr), col_factor(nullptr),
      row_part(nullptr), col_part(nullptr), mean_part(nullptr) {}

int64_t AdafactorJob::carve(double* memory) {
  int64_t used = 0;
  const auto take = [&](int64_t n) {
    double* place = memory == nullptr ? nullptr : memory + used;
    used += n;
    return place;
  };
  const bool divided = tiling.divided(), kept = tiling.factored && !tiling.small;
  param_squares = take(tiling.tiles);
  update_squares = take(divided ? tiling.chunks : tiling.tiles);
  mean = take(kept ? factored->lead : 0);
  col_factor = take(kept ? factored->lead * factored->cols : 0);
  row_part = take(divided ? factored->lead * factored->rows * tiling.col_tiles : 0);
  col_part = take(divided ? factored->lead * tiling.row_tiles * factored->cols : 0);
  mean_part = take(divided ? factored->lead * tiling.row_units : 0);
  return used;
}

void AdafactorJob::finish_means() {
  if (!tiling.divided()) return;
  for (int64_t m = 0; m < factored->lead; ++m)
    mean[m] = max_nan(sum(mean_part + m * tiling.row_units, tiling.row_units) / double(factored->rows), moments.least_mean);
}

void AdafactorJob::finish_step() {
  const double numel = double(row->numel);
  const double params = sum(param_squares, tiling.tiles);
  const double updates = Adafactor::clips(group->hyper) ? sum(update_squares, tiling.divided() ? tiling.chunks : tiling.tiles) : 0.0;
  step = Adafactor::step(group->hyper, factored->flags, context.step, std::sqrt(params / numel), std::sqrt(updates / numel));
}

double* AdafactorWorkspace::reserve(int place, int64_t size) {
  const size_t index = size_t(place + 1);
  if (blocks_.size() <= index) blocks_.resize(index + 1);
  Block& block = blocks_[index];
  if (block.size < size) {
    block.memory.reset();
    block.memory.reset(new double[size_t(size)]);
    block.size = size;
  }
  return block.memory.get();
}

void update_adafactor(const std::vector<TensorRow>& rows, const std::vector<FactoredRow>& factored,
                      const std::vector<GroupRow>& groups, const StepControl& control, AdafactorWorkspace& workspace) {
  const StepDecision decision = decide(control);
  if (decision.skip) return;

  std::vector<AdafactorJob> jobs;
  jobs.reserve(rows.size());
  int64_t elements = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    const TensorRow& row = rows[r];
    if (row.grad == nullptr) continue;
    *row.step += 1.0f;
    if (row.numel == 0) continue;
    elements += row.numel;
    jobs.emplace_back(row, factored[r], groups[size_t(row.group)], UpdateContext{double(*row.step), decision.grad_factor, control.seed});
  }

  const int threads = threads_for(elements);
  const int64_t share = std::min(kWarmElements, elements / (threads * kTensorsPerThread));
  const int64_t undivided = std::max(kHotElements, share);
  std::vector<AdafactorJob*> divided, small;
  int64_t own = 0, scratch = 0, shared = 0;  // doubles
  for (AdafactorJob& job : jobs) {
    scratch = std::max(scratch, scratch_of(job));
    if (threads > 1 && job.row->numel > undivided) {
      divided.push_back(&job);
      shared += job.carve(nullptr);
    } else {
      small.push_back(&job);
      own = std::max(own, job.carve(nullptr));
    }
  }
  // The larger ones first: what is left at the end then evens out.
  std::stable_partition(small.begin(), small.end(), [](const AdafactorJob* job) { return job->row->numel > kBundle; });

  double* memory = workspace.reserve(-1, shared);
  for (AdafactorJob* job : divided) memory += job->carve(memory);
  std::vector<double*> place(static_cast<size_t>(threads));
  for (int t = 0; t < threads; ++t) place[size_t(t)] = workspace.reserve(t, scratch + own);

  std::vector<Piece> first = pieces_of(divided, &AdafactorTiling::tiles, 1);
  const int64_t tiles = int64_t(first.size());
  for (size_t begin = 0, end = 0; begin < small.size(); begin = end) {
    int64_t size = 0;
    while (end < small.size() && size < kBundle) size += small[end++]->row->numel;
    first.push_back({nullptr, int64_t(begin), int64_t(end)});
  }
  const std::vector<Piece> units = pieces_of(divided, &AdafactorTiling::units, 1);
  const std::vector<Piece> spans = pieces_of(divided, &AdafactorTiling::chunks, kSpan);
  const int64_t first_count = int64_t(first.size()), unit_count = int64_t(units.size()), span_count = int64_t(spans.size());
  const int64_t divided_count = int64_t(divided.size());
  const AdafactorKernels& kernels = active_kernels().adafactor;

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    double* const mine = place[size_t(thread_number())];
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < first_count; ++i) {
      const Piece& piece = first[size_t(i)];
      if (i < tiles) {
        kernels.stats(*piece.job, piece.first, mine);
        continue;
      }
      for (int64_t s = piece.first; s < piece.last; ++s) {
        small[size_t(s)]->carve(mine + scratch);
        whole_step(kernels, *small[size_t(s)], mine);
      }
    }
    if (divided_count > 0) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < unit_count; ++i) kernels.combine(*units[size_t(i)].job, units[size_t(i)].first);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < divided_count; ++i) divided[size_t(i)]->finish_means();
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < span_count; ++i) {
        const Piece& piece = spans[size_t(i)];
        if (needs_norm(*piece.job))
          for (int64_t chunk = piece.first; chunk < piece.last; ++chunk) kernels.norm(*piece.job, chunk);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < divided_count; ++i) divided[size_t(i)]->finish_step();
      // Backwards: what was read last is still in the cache.
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = span_count - 1; i >= 0; --i)
        apply_chunks(kernels, *spans[size_t(i)].job, spans[size_t(i)].first, spans[size_t(i)].last);
    }
  }
}

}  // namespace fused

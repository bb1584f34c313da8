// Adafactor's step on the CPU: one parallel region for the whole model.
#pragma once

#include <memory>
#include <vector>

#include "../adafactor.h"
#include "../table.h"
#include "kernels.h"

namespace fused {

// How one tensor is divided. Fixed by its shape alone: sums are taken per tile or chunk and then in order, so results do
// not depend on the number of threads.
struct AdafactorTiling {
  static constexpr int64_t kElements = 65536;  // about the size of a tile
  static constexpr int64_t kWidth = 8192;      // its columns at most
  static constexpr int64_t kLines = 32;        // its lines at least, or column sums would be a large part of the traffic
  static constexpr int64_t kUnit = 4096;       // rows or columns that are combined at once
  static constexpr int64_t kSmall = 256;       // elements of a small matrix at most; several are computed at once
  static constexpr int64_t kFew = 8;           // fewer of them would leave most lanes empty

  explicit AdafactorTiling(const TensorRow& row, const FactoredRow& factored);

  bool factored;
  bool small;                    // many small matrices
  int64_t group;                 // whole matrices in a tile; 0: matrices are divided
  int64_t width, lines;          // of a tile of a divided matrix
  int64_t col_tiles, row_tiles;  // of a divided matrix
  int64_t row_units, col_units;  // of a divided matrix
  int64_t tiles, chunks, units;  // of the tensor

  // Whether a matrix is divided, so that sums and averages of all its tiles come before the first update.
  bool divided() const { return factored && group == 0; }
};

// One tensor in one step.
struct AdafactorJob {
  AdafactorJob(const TensorRow& row, const FactoredRow& factored, const GroupRow& group, const UpdateContext& context);

  // Finds places for sums and factors in `memory`, and returns how many doubles they take; null: only that.
  int64_t carve(double* memory);

  void finish_means();  // after `combine`: the mean of every matrix's row variances
  void finish_step();   // after `norm`: the scalars of `apply`

  const TensorRow* row;
  const FactoredRow* factored;
  const GroupRow* group;
  UpdateContext context;
  AdafactorTiling tiling;
  Adafactor::Moments moments;
  Adafactor::Step step;
  bool wide;  // float64

  double* param_squares;   // per tile
  double* update_squares;  // per tile; of divided matrices per chunk
  double* mean;            // per matrix, bounded from below; not of small ones
  void* col_factor;        // lead x cols, of the arithmetic's type; not of small matrices
  double* row_part;        // divided matrices: lead x rows x col_tiles
  double* col_part;        // divided matrices: lead x row_tiles x cols
  double* mean_part;       // divided matrices: lead x row_units
};

struct FactoredTable {
  std::vector<FactoredRow> rows;
};

// Memory that is kept from step to step.
class AdafactorWorkspace {
 public:
  // At least `size` doubles, not initialized; `place` -1 is shared, else a thread's own.
  double* reserve(int place, int64_t size);

 private:
  struct Block {
    std::unique_ptr<double[]> memory;
    int64_t size = 0;
  };
  std::vector<Block> blocks_;
};

void update_adafactor(const std::vector<TensorRow>& rows, const std::vector<FactoredRow>& factored,
                      const std::vector<GroupRow>& groups, const StepControl& control, AdafactorWorkspace& workspace);

}  // namespace fused

// Adafactor's kernels: what they and their host agree on. Three launches for a whole model:
//
//   stats   sums of g^2 by row and column and of p^2, tile by tile; the last tile of a row, a column, a tensor averages them
//   norm    sum of the squared updates, where updates are clipped
//   apply   parameters and first moments
//
// A tensor is cut into tiles in the same way for all three, by its shape alone; what is added up is added up in the order
// of tiles: results are the same to the bit from run to run, whatever the order blocks run in.
#pragma once

#include "../adafactor.h"
#include "device_table.h"
#include "prologue.h"

namespace fused::cuda {

// How a tensor is cut into tiles.
enum class Cut : uint32_t {
  kElements,  // not factored: kChunk elements after each other
  kMatrices,  // several whole matrices, which together fit into a block's memory
  kLines,     // whole lines of a narrow matrix, as many as fit
  kRectangles // of a wide matrix: a warp takes a line, a lane keeps its columns
};

constexpr int kRectangleWidth = 256;  // columns: kWarp lanes of kVector
constexpr int kLeastLines = 64, kMostLines = 256;  // of a rectangle; more make fewer sums of columns, fewer make more blocks
constexpr int kStagedBytes = 16384;  // of squares that a block keeps

// Beside the DeviceRow of the same index. Places are byte offsets into the workspace.
struct AdafactorRow {
  FactoredRow shape;
  Cut cut;
  int64_t group;                 // matrices in a tile of kMatrices
  int64_t width, lines;          // of a tile of kLines and kRectangles
  int64_t col_tiles, row_tiles;  // of a matrix
  int64_t tiles;                 // of the tensor, at least one
  int64_t first_tile;            // in the list of all tiles
  int64_t param_squares;         // double per tile
  int64_t update_squares;        // double per tile
  int64_t mean;                  // double per matrix: of the rows' averages, bounded from below
  int64_t mean_part;             // double per matrix and row of tiles
  int64_t col_factor;            // lead x cols, of the arithmetic's type, as the two below
  int64_t row_part;              // lead x rows x col_tiles
  int64_t col_part;              // lead x row_tiles x cols
  int64_t arrived;               // uint32: tiles of the tensor, then of each row of tiles, then of each column of tiles
};

// What one launch leaves for the next ones.
struct alignas(16) AdafactorWork {
  double hyper[kMaxHypers];
  double factor;  // of the gradient
  double limit;   // of the inverse root
  double count;   // steps, with this one
  double rms_param;
  Adafactor::Step step;
  uint32_t skip;
};

struct AdafactorArgs {
  const DeviceRow* rows;
  const void* const* grads;
  const AdafactorRow* factored;
  AdafactorWork* work;
  const Piece* tiles;
  unsigned char* workspace;
  uint64_t seed;
};

struct AdafactorStatsArgs {
  AdafactorArgs tables;
  int64_t tile_count;  // 0: nothing but the decision is asked for
  StepControl control;
  const GroupRow* groups;  // null: they are inline
  GroupRow inline_groups[kInlineGroups];
};
static_assert(sizeof(AdafactorStatsArgs) <= 4000, "kernel arguments hold 4 KB");

__global__ void adafactor_stats(const __grid_constant__ AdafactorStatsArgs args);
__global__ void adafactor_norm(AdafactorArgs args);
__global__ void adafactor_apply(AdafactorArgs args);

template <class T>
FUSED_HD T* at(const AdafactorArgs& args, int64_t offset) {
  return reinterpret_cast<T*>(args.workspace + offset);
}

}  // namespace fused::cuda

// A block's tile of a tensor, and how its threads walk over it.
#pragma once

#include "adafactor.h"
#include "block.h"
#include "operands.h"

namespace fused::cuda {

// Of kElements and kMatrices consecutive elements; else [line, line + lines) x [col, col + width) of one matrix.
struct Tile {
  int64_t matrix, line, col;
  int64_t begin;  // first element
  int lines, width;
  int elements;   // of kElements and kMatrices
};

__device__ __forceinline__ Tile tile_of(const AdafactorRow& row, int64_t numel, int64_t index) {
  const FactoredRow& shape = row.shape;
  Tile tile = {};
  if (row.cut == Cut::kElements || row.cut == Cut::kMatrices) {
    const int64_t matrix = shape.rows * shape.cols, size = row.cut == Cut::kElements ? kChunk : row.group * matrix;
    tile.matrix = row.cut == Cut::kElements ? 0 : index * row.group;
    tile.begin = index * size;
    tile.elements = int(numel - tile.begin < size ? numel - tile.begin : size);
    tile.width = row.cut == Cut::kElements ? 0 : int(shape.cols);
    tile.lines = row.cut == Cut::kElements ? 0 : int(tile.elements / shape.cols);
    tile.line = 0;
    return tile;
  }
  const int64_t of_matrix = row.row_tiles * row.col_tiles, within = index % of_matrix;
  tile.matrix = index / of_matrix;
  tile.line = within / row.col_tiles * row.lines;
  tile.col = within % row.col_tiles * row.width;
  tile.lines = int(shape.rows - tile.line < row.lines ? shape.rows - tile.line : row.lines);
  tile.width = int(shape.cols - tile.col < row.width ? shape.cols - tile.col : row.width);
  tile.begin = (tile.matrix * shape.rows + tile.line) * shape.cols + tile.col;
  tile.elements = tile.lines * tile.width;
  return tile;
}

// ---- a tile by lines: each warp takes one after the other, a lane has kVector columns ----

struct Lines {
  int64_t begin, stride;  // elements
  int count, width, last_width;
};

__device__ __forceinline__ Lines lines_of(const AdafactorRow& by, const Tile& tile) {
  if (by.cut == Cut::kRectangles) return {tile.begin, by.shape.cols, tile.lines, tile.width, tile.width};
  // In the order of memory, whatever the elements stand for.
  const int whole = tile.elements / kRectangleWidth, left = tile.elements % kRectangleWidth;
  return {tile.begin, kRectangleWidth, whole + (left != 0), kRectangleWidth, left != 0 ? left : kRectangleWidth};
}

__device__ __forceinline__ int first_line() { return int(threadIdx.x) / kWarp; }
__device__ __forceinline__ int first_column() { return int(threadIdx.x) % kWarp * kVector; }

__device__ __forceinline__ int width_of(const Lines& lines, int line) { return line == lines.count - 1 ? lines.last_width : lines.width; }

__device__ __forceinline__ int count_at(const Lines& lines, int line) {
  const int left = width_of(lines, line) - first_column();
  return line >= lines.count ? 0 : count_of<kVector>(left);
}

// Whether every line starts at a place for vectors and ends with one.
template <class Raw>
__device__ __forceinline__ bool in_vectors(const void* base, const Lines& lines) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(static_cast<const Raw*>(base) + lines.begin);
  const int64_t step = lines.count > 1 ? lines.stride * int64_t(sizeof(Raw)) : 0;
  return first % 16 == 0 && step % 16 == 0 && lines.width % kVector == 0 && lines.last_width % kVector == 0;
}

// Loads of several lines are under way at once: a lane without elements reads the first ones, for nothing.
template <class Raw, int U>
__device__ __forceinline__ void load_lines(const void* base, const Lines& lines, int line, Raw (&raw)[U][kVector], bool (&present)[U]) {
  const Raw* first = static_cast<const Raw*>(base) + lines.begin;
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int at = line + u * kWarps;
    present[u] = count_at(lines, at) > 0;
    load_vector<Reuse::kAgain>(first + (present[u] ? at * lines.stride + first_column() : 0), raw[u]);
  }
}

template <class Raw>
constexpr int kLinesAtOnce = 16 / int(sizeof(Raw));

struct AsFloat {
  __device__ __forceinline__ float operator()(float x) const { return x; }
  __device__ __forceinline__ float operator()(unsigned short x) const { return bf16 ? bf16_to_float(x) : fp16_to_float(x); }
  bool bf16;
};

}  // namespace fused::cuda

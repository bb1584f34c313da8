#include "adafactor_table.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "adafactor.h"
#include "device_image.h"

namespace fused::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts a tensor into tiles, by its shape and format alone, and finds places for its sums from byte `used` on.
AdafactorRow cut_of(const TensorRow& row, const FactoredRow& shape, int64_t& used) {
  const int64_t size = row.param_format == kFloat64 ? 8 : 4, staged = kStagedBytes / size;
  const int64_t matrix = shape.rows * shape.cols;
  AdafactorRow by{};
  by.shape = shape;
  by.row_tiles = by.col_tiles = 1;
  if (shape.row_var == nullptr || row.numel == 0) {
    by.cut = Cut::kElements;
    by.tiles = std::max<int64_t>(1, ceil_div(row.numel, kChunk));  // an empty tensor's step is counted, too
  } else if (matrix <= staged) {
    by.cut = Cut::kMatrices;
    by.group = staged / matrix;
    by.tiles = ceil_div(shape.lead, by.group);
  } else {
    by.cut = shape.cols < kRectangleWidth ? Cut::kLines : Cut::kRectangles;
    by.width = by.cut == Cut::kLines ? shape.cols : kRectangleWidth;
    const int64_t even = std::min<int64_t>(kMostLines, std::max<int64_t>(kLeastLines, ceil_div(shape.rows, kWarp)));
    by.lines = by.cut == Cut::kLines ? staged / shape.cols : even;
    by.col_tiles = ceil_div(shape.cols, by.width);
    by.row_tiles = ceil_div(shape.rows, by.lines);
    by.tiles = shape.lead * by.row_tiles * by.col_tiles;
  }
  const bool factored = by.cut != Cut::kElements, divided = by.cut == Cut::kLines || by.cut == Cut::kRectangles;
  const auto take = [&](bool needed, int64_t count, int64_t bytes) {
    const int64_t place = used;
    if (needed) used += ceil_div(count * bytes, 16) * 16;
    return place;
  };
  by.param_squares = take(true, by.tiles, 8);
  by.update_squares = take(true, by.tiles, 8);
  by.mean = take(factored, shape.lead, 8);
  by.mean_part = take(divided, shape.lead * by.row_tiles, 8);
  by.col_factor = take(factored, shape.lead * shape.cols, size);
  by.row_part = take(by.cut == Cut::kRectangles, shape.lead * shape.rows * by.col_tiles, size);
  by.col_part = take(divided, shape.lead * by.row_tiles * shape.cols, size);
  by.arrived = take(true, 1 + (divided ? shape.lead * (by.row_tiles + by.col_tiles) : 0), 4);
  return by;
}

// One block per row lists the row's tiles and clears what it counts in.
__global__ void __launch_bounds__(kThreads)
list_tiles(const AdafactorRow* rows, int64_t row_count, Piece* tiles, unsigned char* workspace) {
  if (blockIdx.x >= row_count) return;
  const AdafactorRow& row = rows[blockIdx.x];
  for (int64_t i = threadIdx.x; i < row.tiles; i += kThreads) tiles[row.first_tile + i] = {int32_t(blockIdx.x), int32_t(i)};
  const bool divided = row.cut == Cut::kLines || row.cut == Cut::kRectangles;
  const int64_t counters = 1 + (divided ? row.shape.lead * (row.row_tiles + row.col_tiles) : 0);
  uint32_t* arrived = reinterpret_cast<uint32_t*>(workspace + row.arrived);
  for (int64_t i = threadIdx.x; i < counters; i += kThreads) arrived[i] = 0u;
}

}  // namespace

AdafactorTable::AdafactorTable(int device) : table_(device), image_(std::make_unique<DeviceImage>(device)) {}
AdafactorTable::~AdafactorTable() = default;

int64_t AdafactorTable::uploads() const { return table_.uploads() + image_->uploads(); }

void AdafactorTable::describe(const std::vector<TensorRow>& rows, const std::vector<FactoredRow>& factored) {
  std::vector<AdafactorRow> described;
  int64_t used = 0;
  tile_count_ = 0;
  factored_groups_.clear();
  for (const int64_t index : table_.active_) {
    const TensorRow& row = rows[size_t(index)];
    if (row.step == nullptr) throw std::invalid_argument("an Adafactor row without a step count");
    described.push_back(cut_of(row, factored.at(size_t(index)), used));
    described.back().first_tile = tile_count_;
    tile_count_ += described.back().tiles;
    if (described.back().cut != Cut::kElements) factored_groups_.push_back(row.group);
  }
  std::sort(factored_groups_.begin(), factored_groups_.end());
  factored_groups_.erase(std::unique(factored_groups_.begin(), factored_groups_.end()), factored_groups_.end());
  if (tile_count_ > INT32_MAX) throw std::length_error("more tiles than a launch has blocks");

  row_count_ = int64_t(described.size());
  Layout layout{};
  layout.image = padded(row_count_ * int64_t(sizeof(AdafactorRow)));
  layout.work = layout.image;
  layout.tiles = layout.work + padded(row_count_ * int64_t(sizeof(AdafactorWork)));
  layout.workspace = layout.tiles + padded(tile_count_ * int64_t(sizeof(Piece)));
  layout.bytes = layout.workspace + padded(used) + 256;
  if (std::memcmp(&layout, &layout_, sizeof layout) != 0) image_->forget();
  layout_ = layout;
  image_->image.assign(size_t(layout.image), 0);
  if (!described.empty()) std::memcpy(image_->image.data(), described.data(), described.size() * sizeof(AdafactorRow));
}

void AdafactorTable::begin(const std::vector<TensorRow>& rows, const std::vector<FactoredRow>& factored,
                           const std::vector<GroupRow>& groups, bool rows_changed, uintptr_t stream) {
  const OnDevice current(table_.device_);
  const bool describe_again = table_.begin(rows, groups, rows_changed, stream);
  if (describe_again) describe(rows, factored);
  const auto list = [this](unsigned char* memory, cudaStream_t on) {
    launch("list_tiles", &list_tiles, std::max<int64_t>(1, row_count_), kThreads, on, at<const AdafactorRow>(memory, layout_.rows),
           row_count_, at<Piece>(memory, layout_.tiles), memory + layout_.workspace);
  };
  current_ = image_->place(layout_.bytes, describe_again, layout_.rows, stream_of(stream), list);
}

// Whether a tensor with rows and columns has its updates clipped; one without knows their size when its moment is done.
bool AdafactorTable::clips(const std::vector<GroupRow>& groups) const {
  return std::any_of(factored_groups_.begin(), factored_groups_.end(), [&](int32_t g) {
    const GroupRow& group = groups[size_t(g)];
    return group.hyper_at[Adafactor::kThreshold] != nullptr || Adafactor::clips(group.hyper);
  });
}

void AdafactorTable::update(const std::vector<GroupRow>& groups, uintptr_t stream, const StepControl& control) const {
  const OnDevice current(table_.device_);
  const cudaStream_t on = stream_of(stream);
  const auto& base = table_.layout_;
  AdafactorStatsArgs first{};
  first.tables = {at<DeviceRow>(table_.current_, base.rows), at<const void*>(table_.current_, base.grads),
                  at<AdafactorRow>(current_, layout_.rows),  at<AdafactorWork>(current_, layout_.work),
                  at<Piece>(current_, layout_.tiles),        current_ + layout_.workspace,
                  control.seed};
  first.tile_count = tile_count_;
  first.control = control;
  if (table_.group_count_ > kInlineGroups) first.groups = at<GroupRow>(table_.current_, base.groups);
  else std::copy(groups.begin(), groups.end(), first.inline_groups);
  launch("adafactor_stats", &adafactor_stats, std::max<int64_t>(1, tile_count_), kThreads, on, first);
  ++launches_;
  if (tile_count_ == 0) return;
  if (clips(groups)) {
    launch("adafactor_norm", &adafactor_norm, tile_count_, kThreads, on, first.tables);
    ++launches_;
  }
  launch("adafactor_apply", &adafactor_apply, tile_count_, kThreads, on, first.tables);
  ++launches_;
}

std::pair<int64_t, std::string> AdafactorTable::bad_row(const std::vector<TensorRow>& rows,
                                                        const std::vector<FactoredRow>& factored) const {
  const OnDevice current(table_.device_);
  for (size_t r = 0; r < rows.size(); ++r) {
    if (rows[r].grad == nullptr || rows[r].numel == 0) continue;
    const int size = rows[r].param_format == kFloat64 ? 8 : 4;
    std::string what = table_.fault("state row_var", factored[r].row_var, size);
    if (what.empty()) what = table_.fault("state col_var", factored[r].col_var, size);
    if (what.empty()) what = table_.fault("state variance", factored[r].variance, size);
    if (!what.empty()) return {int64_t(r), what};
  }
  return table_.bad_row(rows);
}

}  // namespace fused::cuda

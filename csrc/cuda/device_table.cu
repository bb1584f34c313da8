#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "device_image.h"
#include "device_table.h"
#include "driver.h"
#include "launch.h"
#include "prologue.h"
#include "reduce.h"
#include "update.h"

namespace fused::cuda {
namespace {

// One block per row lists the row's pieces; the first also clears what `reduce` counts in.
__global__ void __launch_bounds__(kThreads)
list_pieces(const DeviceRow* rows, int64_t row_count, Piece* chunks, Piece* spans, uint32_t* flags, uint32_t* arrived,
            uint32_t* counter) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *counter = 0u;
  if (blockIdx.x >= row_count) return;
  if (threadIdx.x == 0) flags[blockIdx.x] = arrived[blockIdx.x] = 0u;
  const DeviceRow& row = rows[blockIdx.x];
  const int64_t chunk_count = (row.tensor.numel + kChunk - 1) / kChunk, span_count = (row.tensor.numel + kSpan - 1) / kSpan;
  for (int64_t i = threadIdx.x; i < chunk_count; i += kThreads) chunks[row.first_chunk + i] = {int32_t(blockIdx.x), int32_t(i)};
  for (int64_t i = threadIdx.x; i < span_count; i += kThreads) spans[row.first_span + i] = {int32_t(blockIdx.x), int32_t(i)};
}

bool is_plain(const TensorRow& row) {
  if (row.param_format != kFloat32 || row.grad_format != kFloat32 || row.master_format != kNone) return false;
  return std::all_of(row.state_format, row.state_format + kMaxStates, [](uint8_t f) { return f == kNone || f == kFloat32; });
}

std::string version_name(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

}  // namespace

bool debugging() {
  static const bool on = [] {
    const char* value = std::getenv("FUSED_CUDA_DEBUG");
    return value != nullptr && std::strcmp(value, "") != 0 && std::strcmp(value, "0") != 0;
  }();
  return on;
}

std::string problem(int device) {
  int driver = 0, runtime = 0, count = 0;
  cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver is loaded";
  if (driver / 1000 < runtime / 1000)
    return "the NVIDIA driver supports CUDA " + version_name(driver) + ", but the kernels were built with CUDA " +
           version_name(runtime) + ": install a newer driver, or rebuild with a toolkit of CUDA " + std::to_string(driver / 1000);
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0)
    return std::string("no CUDA device is visible") + (error != cudaSuccess ? std::string(": ") + cudaGetErrorString(error) : "");
  if (device >= count) return "there is no CUDA device " + std::to_string(device) + ", only " + std::to_string(count);
  const OnDevice current(device);
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, DeviceImage::kernel()) != cudaSuccess) {
    cudaGetLastError();  // not to be reported again by the next caller
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string digits = std::to_string(major) + std::to_string(minor);
    return "the kernels were not built for compute capability " + std::to_string(major) + "." + std::to_string(minor) +
           " of CUDA device " + std::to_string(device) + ": rebuild with FUSED_CUDA_ARCHS=" + digits;
  }
  return "";
}

DeviceTable::DeviceTable(int device) : device_(device), image_(std::make_unique<DeviceImage>(device)) {}
DeviceTable::~DeviceTable() = default;

bool DeviceTable::captured() const { return image_->captured(); }
int64_t DeviceTable::uploads() const { return image_->uploads(); }

void DeviceTable::describe(const std::vector<TensorRow>& rows, size_t group_count) {
  std::vector<const TensorRow*> active;
  for (const TensorRow& row : rows)  // `row` is an element of `rows`: its place there is its index
    if (row.grad != nullptr) active.push_back(&row);
  const auto key = [](const TensorRow* row) { return int(row->rule) * 2 + int(row->param_format == kFloat64); };
  std::stable_sort(active.begin(), active.end(), [&](const TensorRow* a, const TensorRow* b) { return key(a) < key(b); });

  row_count_ = int64_t(active.size());
  group_count_ = int64_t(group_count);
  sections_.clear();
  active_.clear();
  std::vector<DeviceRow> device_rows;
  std::vector<const void*> grads;
  chunk_count_ = span_count_ = 0;
  for (size_t r = 0; r < active.size(); ++r) {
    const TensorRow& row = *active[r];
    if (row.group < 0 || size_t(row.group) >= group_count) throw std::out_of_range("a row of a group that does not exist");
    if (r == 0 || key(active[r - 1]) != key(&row)) sections_.push_back({row.rule, row.param_format == kFloat64 ? kDouble : kPlain, chunk_count_, 0});
    Section& section = sections_.back();
    if (section.variant == kPlain && !is_plain(row)) section.variant = kMixed;
    device_rows.push_back({row, chunk_count_, span_count_, &row - rows.data()});
    device_rows.back().tensor.grad = nullptr;
    grads.push_back(row.grad);
    active_.push_back(device_rows.back().index);
    const int64_t chunks = (row.numel + kChunk - 1) / kChunk;
    section.chunks += chunks;
    chunk_count_ += chunks;
    span_count_ += (row.numel + kSpan - 1) / kSpan;
  }

  Layout layout{};
  layout.groups = layout.grads + padded(row_count_ * int64_t(sizeof(void*)));
  layout.rows = layout.groups + (group_count_ > kInlineGroups ? padded(group_count_ * int64_t(sizeof(GroupRow))) : 0);
  layout.image = layout.rows + padded(row_count_ * int64_t(sizeof(DeviceRow)));
  layout.work = layout.image;
  layout.chunks = layout.work + padded(row_count_ * int64_t(sizeof(RowWork)));
  layout.spans = layout.chunks + padded(chunk_count_ * int64_t(sizeof(Piece)));
  layout.partials = layout.spans + padded(span_count_ * int64_t(sizeof(Piece)));
  layout.flags = layout.partials + padded(span_count_ * int64_t(sizeof(double)));
  layout.arrived = layout.flags + padded(row_count_ * int64_t(sizeof(uint32_t)));
  layout.counter = layout.arrived + padded(row_count_ * int64_t(sizeof(uint32_t)));
  layout.bytes = layout.counter + 256;
  if (std::memcmp(&layout, &layout_, sizeof layout) != 0) image_->forget();
  layout_ = layout;
  image_->image.assign(size_t(layout.image), 0);
  if (!active.empty()) {
    std::memcpy(image_->image.data() + layout.grads, grads.data(), grads.size() * sizeof(void*));
    std::memcpy(image_->image.data() + layout.rows, device_rows.data(), device_rows.size() * sizeof(DeviceRow));
  }
}

bool DeviceTable::begin(const std::vector<TensorRow>& rows, const std::vector<GroupRow>& groups, bool rows_changed, uintptr_t stream) {
  const OnDevice current(device_);
  const bool describe_again = rows_changed || group_count_ != int64_t(groups.size());
  if (describe_again) describe(rows, groups.size());
  const bool groups_in_memory = group_count_ > kInlineGroups;
  if (groups_in_memory) std::memcpy(image_->image.data() + layout_.groups, groups.data(), groups.size() * sizeof(GroupRow));
  const auto list = [this](unsigned char* memory, cudaStream_t on) {
    launch("list_pieces", &list_pieces, std::max<int64_t>(1, row_count_), kThreads, on,
           static_cast<const DeviceRow*>(at<DeviceRow>(memory, layout_.rows)), row_count_, at<Piece>(memory, layout_.chunks),
           at<Piece>(memory, layout_.spans), at<uint32_t>(memory, layout_.flags), at<uint32_t>(memory, layout_.arrived),
           at<uint32_t>(memory, layout_.counter));
  };
  current_ = image_->place(layout_.bytes, describe_again || groups_in_memory, layout_.rows, stream_of(stream), list);
  return describe_again;
}

void DeviceTable::reduce(uintptr_t stream, bool maximum, uintptr_t row_values, uintptr_t total) const {
  const OnDevice current(device_);
  ReduceArgs args{};
  args.rows = at<DeviceRow>(current_, layout_.rows);
  args.grads = at<const void*>(current_, layout_.grads);
  args.spans = span_count_ > 0 ? at<Piece>(current_, layout_.spans) : nullptr;
  args.partials = at<double>(current_, layout_.partials);
  args.flags = at<uint32_t>(current_, layout_.flags);
  args.arrived = at<uint32_t>(current_, layout_.arrived);
  args.counter = at<uint32_t>(current_, layout_.counter);
  args.row_values = reinterpret_cast<double*>(row_values);
  args.total = reinterpret_cast<double*>(total);
  args.row_count = row_count_;
  args.maximum = maximum;
  launch("reduce", &cuda::reduce, std::max<int64_t>(1, span_count_), kThreads, stream_of(stream), args);
  ++launches_;
}

void DeviceTable::update(const std::vector<GroupRow>& groups, uintptr_t stream, const StepControl& control) const {
  const OnDevice current(device_);
  PrologueArgs first{};
  first.control = control;
  first.rows = at<DeviceRow>(current_, layout_.rows);
  first.work = at<RowWork>(current_, layout_.work);
  first.row_count = row_count_;
  if (group_count_ > kInlineGroups) {
    first.groups = at<GroupRow>(current_, layout_.groups);
  } else {
    std::copy(groups.begin(), groups.end(), first.inline_groups);
  }
  launch("prologue", &prologue, std::max<int64_t>(1, (row_count_ + kThreads - 1) / kThreads), kThreads, stream_of(stream), first);
  ++launches_;

  for (const Section& section : sections_) {
    if (section.chunks == 0) continue;
    const UpdateArgs args{first.rows, at<const void*>(current_, layout_.grads), first.work,
                          at<Piece>(current_, layout_.chunks) + section.first_chunk, control.seed};
    launch("update", update_kernel(section.rule, section.variant), section.chunks, kThreads, stream_of(stream), args);
    ++launches_;
  }
}

std::string DeviceTable::fault(const char* name, const void* address, int size) const {
  if (address == nullptr) return "";
  if (reinterpret_cast<uintptr_t>(address) % uintptr_t(size) != 0)
    return std::string(name) + " is not aligned to its elements of " + std::to_string(size) + " bytes";
  cudaPointerAttributes attributes{};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, address);
  if (error != cudaSuccess || (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)) {
    cudaGetLastError();
    return std::string(name) + " is not in CUDA memory";
  }
  if (attributes.type == cudaMemoryTypeDevice && attributes.device != device_)
    return std::string(name) + " is on CUDA device " + std::to_string(attributes.device) + ", not " + std::to_string(device_);
  return "";
}

std::pair<int64_t, std::string> DeviceTable::bad_row(const std::vector<TensorRow>& rows) const {
  const OnDevice current(device_);
  for (size_t r = 0; r < rows.size(); ++r) {
    const TensorRow& row = rows[r];
    if (row.grad == nullptr || row.numel == 0) continue;
    std::string what = fault("parameter", row.param, bytes_of(row.param_format));
    if (what.empty()) what = fault("gradient", row.grad, bytes_of(row.grad_format));
    if (what.empty() && row.master != nullptr) what = fault("master", row.master, bytes_of(row.master_format));
    if (what.empty()) what = fault("step count", row.step, 4);
    for (int k = 0; k < kMaxStates && what.empty(); ++k) {
      what = fault("state", row.state[k], bytes_of(row.state_format[k]));
      if (what.empty()) what = fault("block scale", row.scale[k], 2);
    }
    if (!what.empty()) return {int64_t(r), what};
  }
  return {-1, ""};
}

}  // namespace fused::cuda

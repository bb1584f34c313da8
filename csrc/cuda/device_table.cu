#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "device_table.h"
#include "driver.h"
#include "launch.h"
#include "prologue.h"
#include "reduce.h"
#include "update.h"

namespace fused::cuda {
namespace {

// Kernel arguments hold 4 KB.
struct Upload {
  static constexpr int64_t kBytes = 4000;
  unsigned char* to;
  int64_t words;
  uint64_t word[kBytes / 8];
};

__global__ void __launch_bounds__(kThreads) write_words(const __grid_constant__ Upload upload) {
  for (int i = int(threadIdx.x); i < upload.words; i += kThreads) reinterpret_cast<uint64_t*>(upload.to)[i] = upload.word[i];
}

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

int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

template <class T>
T* at(unsigned char* memory, int64_t offset) {
  return reinterpret_cast<T*>(memory + offset);
}

cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Calls that global capture forbids, allowed for a scope: they touch nothing that the capture knows of.
class BesideCapture {
 public:
  BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCapture(const BesideCapture&) = delete;
  BesideCapture& operator=(const BesideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A stream that waits for no other and is waited for at its end.
class PrivateStream {
 public:
  PrivateStream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"); }
  ~PrivateStream() { cudaStreamDestroy(stream_); }
  PrivateStream(const PrivateStream&) = delete;
  PrivateStream& operator=(const PrivateStream&) = delete;

  cudaStream_t get() const { return stream_; }
  void finish() const { check(cudaStreamSynchronize(stream_), "writing the tables of a graph"); }

 private:
  cudaStream_t stream_ = nullptr;
};

std::string version_name(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

}  // namespace

class DeviceTable::Memory {
 public:
  Memory(int device, int64_t size) : device_(device), size_(size) { check(cudaMalloc(&address_, size_t(size)), "cudaMalloc of the tables"); }
  ~Memory() {  // waits for the device, so that no kernel is left that reads it; fails harmlessly where CUDA is gone
    int before = 0;
    const BesideCapture beside;
    if (cudaGetDevice(&before) != cudaSuccess) return;
    cudaSetDevice(device_);
    cudaFree(address_);
    cudaSetDevice(before);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  unsigned char* address() const { return static_cast<unsigned char*>(address_); }
  int64_t size() const { return size_; }

 private:
  int device_;
  int64_t size_;
  void* address_ = nullptr;
};

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
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&write_words)) != cudaSuccess) {
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

DeviceTable::DeviceTable(int device) : device_(device) {}
DeviceTable::~DeviceTable() = default;

void DeviceTable::describe(const std::vector<TensorRow>& rows, size_t group_count) {
  std::vector<const TensorRow*> active;
  for (const TensorRow& row : rows)  // `row` is an element of `rows`: its place there is its index
    if (row.grad != nullptr) active.push_back(&row);
  const auto key = [](const TensorRow* row) { return int(row->rule) * 2 + int(row->param_format == kFloat64); };
  std::stable_sort(active.begin(), active.end(), [&](const TensorRow* a, const TensorRow* b) { return key(a) < key(b); });

  row_count_ = int64_t(active.size());
  group_count_ = int64_t(group_count);
  sections_.clear();
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
  if (std::memcmp(&layout, &layout_, sizeof layout) != 0) uploaded_.clear();
  layout_ = layout;
  image_.assign(size_t(layout.image), 0);
  if (!active.empty()) {
    std::memcpy(image_.data() + layout.grads, grads.data(), grads.size() * sizeof(void*));
    std::memcpy(image_.data() + layout.rows, device_rows.data(), device_rows.size() * sizeof(DeviceRow));
  }
}

// Writes the image where it differs from what is `known` to be there; null: nothing is.
void DeviceTable::upload(unsigned char* memory, const unsigned char* known, uintptr_t stream) {
  for (int64_t from = 0; from < layout_.image; from += Upload::kBytes) {
    const int64_t bytes = std::min(Upload::kBytes, layout_.image - from);
    if (known != nullptr && std::memcmp(known + from, image_.data() + from, size_t(bytes)) == 0) continue;
    Upload upload;
    upload.to = memory + from;
    upload.words = bytes / 8;
    std::memcpy(upload.word, image_.data() + from, size_t(bytes));
    launch("write_words", &write_words, 1, kThreads, stream_of(stream), upload);
    ++uploads_;
  }
  const size_t row_bytes = size_t(layout_.image - layout_.rows);
  if (known != nullptr && std::memcmp(known + layout_.rows, image_.data() + layout_.rows, row_bytes) == 0) return;
  launch("list_pieces", &list_pieces, std::max<int64_t>(1, row_count_), kThreads, stream_of(stream),
         static_cast<const DeviceRow*>(at<DeviceRow>(memory, layout_.rows)), row_count_, at<Piece>(memory, layout_.chunks),
         at<Piece>(memory, layout_.spans), at<uint32_t>(memory, layout_.flags), at<uint32_t>(memory, layout_.arrived),
         at<uint32_t>(memory, layout_.counter));
  ++uploads_;
}

void DeviceTable::begin(const std::vector<TensorRow>& rows, const std::vector<GroupRow>& groups, bool rows_changed, uintptr_t stream) {
  const OnDevice current(device_);
  const bool describe_again = rows_changed || group_count_ != int64_t(groups.size());
  if (describe_again) describe(rows, groups.size());
  if (group_count_ > kInlineGroups)
    std::memcpy(image_.data() + layout_.groups, groups.data(), groups.size() * sizeof(GroupRow));

  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(stream), &status), "cudaStreamIsCapturing");
  if (status != cudaStreamCaptureStatusNone) {
    const BesideCapture beside;
    captured_.push_back(std::make_unique<Memory>(device_, layout_.bytes));
    current_ = captured_.back()->address();
    const PrivateStream own;
    upload(current_, nullptr, reinterpret_cast<uintptr_t>(own.get()));
    own.finish();
    return;
  }
  if (memory_ == nullptr || memory_->size() < layout_.bytes) {
    memory_.reset();
    uploaded_.clear();
    memory_ = std::make_unique<Memory>(device_, layout_.bytes + layout_.bytes / 4);
  }
  current_ = memory_->address();
  if (!describe_again && group_count_ <= kInlineGroups && !uploaded_.empty()) return;
  upload(current_, uploaded_.empty() ? nullptr : uploaded_.data(), stream);
  uploaded_ = image_;
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

std::pair<int64_t, std::string> DeviceTable::bad_row(const std::vector<TensorRow>& rows) const {
  const OnDevice current(device_);
  const auto size_of = [](uint8_t format) {
    return format == kFloat64 ? 8 : format == kFloat32 ? 4 : format == kBlock8Signed || format == kBlock8Unsigned || format == kRemainder8 ? 1 : 2;
  };
  const auto fault = [&](const void* address, int size) -> std::string {
    if (address == nullptr) return "";
    if (reinterpret_cast<uintptr_t>(address) % uintptr_t(size) != 0) return "is not aligned to its elements of " + std::to_string(size) + " bytes";
    cudaPointerAttributes attributes{};
    const cudaError_t error = cudaPointerGetAttributes(&attributes, address);
    if (error != cudaSuccess || (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)) {
      cudaGetLastError();
      return "is not in CUDA memory";
    }
    if (attributes.type == cudaMemoryTypeDevice && attributes.device != device_)
      return "is on CUDA device " + std::to_string(attributes.device) + ", not " + std::to_string(device_);
    return "";
  };
  for (size_t r = 0; r < rows.size(); ++r) {
    const TensorRow& row = rows[r];
    if (row.grad == nullptr || row.numel == 0) continue;
    const auto named = [&](const char* name, const void* address, int size) {
      const std::string what = fault(address, size);
      return what.empty() ? what : std::string(name) + " " + what;
    };
    std::string what = named("parameter", row.param, size_of(row.param_format));
    if (what.empty()) what = named("gradient", row.grad, size_of(row.grad_format));
    if (what.empty() && row.master != nullptr) what = named("master", row.master, size_of(row.master_format));
    if (what.empty()) what = named("step count", row.step, 4);
    for (int k = 0; k < kMaxStates && what.empty(); ++k) {
      what = named("state", row.state[k], size_of(row.state_format[k]));
      if (what.empty()) what = named("block scale", row.scale[k], 2);
    }
    if (!what.empty()) return {int64_t(r), what};
  }
  return {-1, ""};
}

}  // namespace fused::cuda

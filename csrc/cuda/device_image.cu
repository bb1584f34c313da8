#include "device_image.h"

#include <algorithm>
#include <cstring>

#include "device_table.h"

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

}  // namespace

class DeviceImage::Memory {
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

DeviceImage::DeviceImage(int device) : device_(device) {}
DeviceImage::~DeviceImage() = default;

const void* DeviceImage::kernel() { return reinterpret_cast<const void*>(&write_words); }

// Writes the image where it differs from what is `known` to be there; null: nothing is.
void DeviceImage::write(unsigned char* memory, const unsigned char* known, cudaStream_t stream, int64_t lasting, const Initialize& initialize) {
  const int64_t size = int64_t(image.size());
  for (int64_t from = 0; from < size; from += Upload::kBytes) {
    const int64_t bytes = std::min(Upload::kBytes, size - from);
    if (known != nullptr && std::memcmp(known + from, image.data() + from, size_t(bytes)) == 0) continue;
    Upload upload;
    upload.to = memory + from;
    upload.words = bytes / 8;
    std::memcpy(upload.word, image.data() + from, size_t(bytes));
    launch("write_words", &write_words, 1, kThreads, stream, upload);
    ++uploads_;
  }
  if (known != nullptr && std::memcmp(known + lasting, image.data() + lasting, size_t(size - lasting)) == 0) return;
  initialize(memory, stream);
  ++uploads_;
}

unsigned char* DeviceImage::place(int64_t bytes, bool changed, int64_t lasting, cudaStream_t stream, const Initialize& initialize) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  if (status != cudaStreamCaptureStatusNone) {
    const BesideCapture beside;
    captured_.push_back(std::make_unique<Memory>(device_, bytes));
    unsigned char* memory = captured_.back()->address();
    const PrivateStream own;
    write(memory, nullptr, own.get(), lasting, initialize);
    own.finish();
    return memory;
  }
  if (memory_ == nullptr || memory_->size() < bytes) {
    memory_.reset();
    written_.clear();
    memory_ = std::make_unique<Memory>(device_, bytes + bytes / 4);
  }
  if (!changed && !written_.empty()) return memory_->address();
  const bool known = !written_.empty() && written_.size() == image.size();
  write(memory_->address(), known ? written_.data() : nullptr, stream, lasting, initialize);
  written_ = image;
  return memory_->address();
}

}  // namespace fused::cuda

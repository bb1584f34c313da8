// Memory of a device that holds what the host describes and what kernels work with.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "launch.h"

namespace fused::cuda {

// What changed since the last step travels as kernel arguments, in stream order: nothing on the host has to outlive the
// call and nothing waits. A step that is captured into a graph gets memory of its own, written before the graph ever runs
// and kept as long as this object: later steps cannot change it under the graph.
class DeviceImage {
 public:
  // Makes what follows the image in a memory: launches on a stream.
  using Initialize = std::function<void(unsigned char* memory, cudaStream_t stream)>;

  explicit DeviceImage(int device);
  ~DeviceImage();
  DeviceImage(const DeviceImage&) = delete;
  DeviceImage& operator=(const DeviceImage&) = delete;

  // The memory that launches on `stream` use, with the image at its beginning and `bytes` in all. `changed` false promises
  // the image of the last call. `initialize` runs where memory is new or the image differs from byte `lasting` on.
  unsigned char* place(int64_t bytes, bool changed, int64_t lasting, cudaStream_t stream, const Initialize& initialize);
  // What is there means nothing any more: the next image is written whole.
  void forget() { written_.clear(); }

  bool captured() const { return !captured_.empty(); }
  int64_t uploads() const { return uploads_; }  // launches so far that wrote images and what follows them

  static const void* kernel();  // one that every build has, to ask the device about

  std::vector<unsigned char> image;  // a multiple of 8 bytes

 private:
  class Memory;
  void write(unsigned char* memory, const unsigned char* known, cudaStream_t stream, int64_t lasting, const Initialize& initialize);

  int device_;
  std::vector<unsigned char> written_;
  std::unique_ptr<Memory> memory_;
  std::vector<std::unique_ptr<Memory>> captured_;
  int64_t uploads_ = 0;
};

inline int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

template <class T>
T* at(unsigned char* memory, int64_t offset) {
  return reinterpret_cast<T*>(memory + offset);
}

inline cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

}  // namespace fused::cuda

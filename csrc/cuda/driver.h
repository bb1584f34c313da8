// The step on a CUDA device: what the bindings and the kernels' hosts agree on. Free of CUDA headers.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../table.h"

namespace fused::cuda {

// Empty if the kernels of this build run on `device`; else the one reason why they do not.
std::string problem(int device);

// Whether every launch is waited for and checked (FUSED_CUDA_DEBUG=1).
bool debugging();

class DeviceImage;

// One device's tables and launches; see DeviceImage for how they get there.
class DeviceTable {
 public:
  explicit DeviceTable(int device);
  ~DeviceTable();
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;

  // Opens a step: brings the device's tables up to date. `rows_changed` false promises the rows of the last call. Returns
  // whether the rows were looked at.
  bool begin(const std::vector<TensorRow>& rows, const std::vector<GroupRow>& groups, bool rows_changed, uintptr_t stream);

  // Norms of the gradients: `row_values` receives {sum of squares or largest magnitude, 1 where an element is not finite}
  // for every row with a gradient that has elements, `total` {value over all rows, number of rows that are not finite}.
  void reduce(uintptr_t stream, bool maximum, uintptr_t row_values, uintptr_t total) const;

  void update(const std::vector<GroupRow>& groups, uintptr_t stream, const StepControl& control) const;

  // The first row that has an address which this device cannot reach, or which its element size does not divide, and what
  // is wrong; (-1, "") if there is none. Slow.
  std::pair<int64_t, std::string> bad_row(const std::vector<TensorRow>& rows) const;

  // What is wrong with an address, which the message calls by `name`; empty if nothing is. Null is no address.
  std::string fault(const char* name, const void* address, int size) const;

  bool captured() const;
  int64_t uploads() const;                        // launches so far that changed the tables
  int64_t launches() const { return launches_; }  // launches so far of everything else

 private:
  friend class AdafactorTable;
  // Byte offsets into the device's memory. What is below `image` is written from the host.
  struct Layout {
    int64_t grads, groups, rows, image, work, chunks, spans, partials, flags, arrived, counter, bytes;
  };
  // The chunks of one rule and arithmetic type: one launch.
  struct Section {
    int rule, variant;
    int64_t first_chunk, chunks;
  };

  void describe(const std::vector<TensorRow>& rows, size_t group_count);

  int device_;
  std::vector<Section> sections_;
  std::vector<int64_t> active_;  // the host's index of each row on the device
  int64_t row_count_ = 0, chunk_count_ = 0, span_count_ = 0, group_count_ = -1;
  Layout layout_{};
  std::unique_ptr<DeviceImage> image_;
  unsigned char* current_ = nullptr;
  mutable int64_t launches_ = 0;
};

}  // namespace fused::cuda

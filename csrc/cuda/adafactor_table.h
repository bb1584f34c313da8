// Adafactor's step on a CUDA device: the tables of any step, and beside them how second moments are kept.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"

namespace fused::cuda {

struct AdafactorRow;

class AdafactorTable {
 public:
  explicit AdafactorTable(int device);
  ~AdafactorTable();
  AdafactorTable(const AdafactorTable&) = delete;
  AdafactorTable& operator=(const AdafactorTable&) = delete;

  // As DeviceTable's; `factored` lies beside `rows`, and is promised to be that of the last call, too.
  void begin(const std::vector<TensorRow>& rows, const std::vector<FactoredRow>& factored, const std::vector<GroupRow>& groups,
             bool rows_changed, uintptr_t stream);
  void reduce(uintptr_t stream, bool maximum, uintptr_t row_values, uintptr_t total) const {
    table_.reduce(stream, maximum, row_values, total);
  }
  void update(const std::vector<GroupRow>& groups, uintptr_t stream, const StepControl& control) const;
  std::pair<int64_t, std::string> bad_row(const std::vector<TensorRow>& rows, const std::vector<FactoredRow>& factored) const;

  bool captured() const { return table_.captured(); }
  int64_t uploads() const;
  int64_t launches() const { return table_.launches() + launches_; }
  int64_t workspace_bytes() const { return layout_.bytes - layout_.workspace; }

 private:
  struct Layout {
    int64_t rows, image, work, tiles, workspace, bytes;
  };

  void describe(const std::vector<TensorRow>& rows, const std::vector<FactoredRow>& factored);
  bool clips(const std::vector<GroupRow>& groups) const;

  DeviceTable table_;
  std::unique_ptr<DeviceImage> image_;
  std::vector<int32_t> factored_groups_;  // that have a tensor with rows and columns
  int64_t row_count_ = 0, tile_count_ = 0;
  Layout layout_{};
  unsigned char* current_ = nullptr;
  mutable int64_t launches_ = 0;
};

}  // namespace fused::cuda

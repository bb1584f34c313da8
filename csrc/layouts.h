// The layouts that tensors were seen with, each kept once: a model's thousands of tensors have few, which stay in the cache.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "tensor_object.h"
#include "tensor_view.h"

namespace fused {

struct Layout {
  TensorTraits traits;
  int64_t numel;
  int64_t element_size;
  uint8_t format;
};

class Layouts {
 public:
  using Index = uint32_t;
  static constexpr Index kNone = 0;

  // The layout of an object that torch's functions described by `view`; none where the object does not say the same.
  Index index_of(const void* object, const TensorView& view) {
    const TensorObjects* objects = TensorObjects::instance();
    Layout layout;
    if (objects == nullptr || object == nullptr || !objects->traits_of(object, layout.traits)) return kNone;
    layout.numel = view.numel;
    layout.format = view.format;
    layout.element_size = bytes_of(view.format);
    // A complex tensor counts as twice the elements of half the size.
    if (TensorObjects::numel(layout.traits) != view.numel) return kNone;
    if (view.numel != 0 && objects->address(object, layout.element_size) != view.data) return kNone;
    const auto found = indices_.try_emplace(key(layout), Index(layouts_.size()));
    if (found.second) layouts_.push_back(layout);
    return found.first->second;
  }

  const Layout& operator[](Index index) const { return layouts_[index]; }
  size_t size() const { return layouts_.size() - 1; }

  void clear() {
    layouts_.assign(1, Layout{});
    indices_.clear();
  }

 private:
  static std::string key(const Layout& layout) {
    return {reinterpret_cast<const char*>(layout.traits.words), sizeof layout.traits.words};
  }

  std::vector<Layout> layouts_ = std::vector<Layout>(1);  // the first one is none
  std::unordered_map<std::string, Index> indices_;
};

}  // namespace fused

// Whether tensors share memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "ops/common.h"

namespace vdit {

// The bytes that the elements of a tensor lie in: runs without a gap, repeated by strides.
//
// Exact for views whose dimensions lie inside each other, however they interleave with another tensor's: rows, columns
// and heads of one buffer, every second token, expanded tensors. A dimension that steps into another one's range, which
// only as_strided makes, counts together with the gaps inside of it.
class Footprint {
 public:
  explicit Footprint(const Tensor& t)
      : begin_(reinterpret_cast<uintptr_t>(t.const_data_ptr())), run_(int64_t(t.element_size())) {
    std::vector<Level> levels;
    for (int64_t i = 0; i < t.dim(); ++i) {
      if (t.size(i) == 0) run_ = 0;
      if (t.size(i) > 1 && t.stride(i) != 0) levels.push_back({t.stride(i) * int64_t(t.element_size()), t.size(i)});
    }
    if (run_ == 0) return;
    std::sort(levels.begin(), levels.end(), [](const Level& a, const Level& b) { return a.stride < b.stride; });
    for (const Level& level : levels) {
      if (level.stride < extent()) {  // no gap, or gaps that are not told apart
        run_ = extent();
        levels_.clear();
      }
      if (level.stride <= run_ && levels_.empty()) {
        run_ += (level.count - 1) * level.stride;
      } else {
        levels_.push_back(level);
      }
    }
  }

  bool meets(const Footprint& other) const {
    if (run_ == 0 || other.run_ == 0) return false;
    return meets(levels_.size(), begin_, other, other.levels_.size(), other.begin_);
  }

 private:
  struct Level {
    int64_t stride, count;  // in bytes; strides grow from level to level
  };

  // Bytes from the first to behind the last, over the first `depth` levels.
  int64_t extent(size_t depth) const {
    int64_t bytes = run_;
    for (size_t i = 0; i < depth; ++i) bytes += (levels_[i].count - 1) * levels_[i].stride;
    return bytes;
  }
  int64_t extent() const { return extent(levels_.size()); }

  // Whether the first `depth` levels, from `at` on, share a byte with the first `depths` levels of another, from
  // `there` on. The larger of the outermost steps is taken apart until the rest steps by one pitch: twice for views of
  // one buffer whose batch items lie anyhow.
  bool meets(size_t depth, uintptr_t at, const Footprint& other, size_t depths, uintptr_t there) const {
    const auto bytes = uintptr_t(extent(depth)), others = uintptr_t(other.extent(depths));
    if (at >= there + others || there >= at + bytes) return false;
    if (depth == 0) return other.meets_range(depths, there, at, at + bytes);
    if (depths == 0) return meets_range(depth, at, there, there + others);
    if (apart_in_every_pitch(depth, at, other, depths, there)) return false;
    if (levels_[depth - 1].stride < other.levels_[depths - 1].stride)
      return other.meets(depths, there, *this, depth, at);
    const auto stride = uintptr_t(levels_[depth - 1].stride), inner = uintptr_t(extent(depth - 1));
    const uintptr_t first = there < at + inner ? 0 : (there - at - inner) / stride + 1;
    const uintptr_t last =
        std::min<uintptr_t>(uintptr_t(levels_[depth - 1].count) - 1, (there + others - 1 - at) / stride);
    for (uintptr_t i = first; i <= last; ++i)
      if (meets(depth - 1, at + i * stride, other, depths, there)) return true;
    return false;
  }

  // Where all strides are multiples of one pitch, as in views of one buffer, the runs' places in it say enough.
  bool apart_in_every_pitch(size_t depth, uintptr_t at, const Footprint& other, size_t depths, uintptr_t there) const {
    int64_t pitch = 0;
    for (size_t i = 0; i < depth; ++i) pitch = std::gcd(pitch, levels_[i].stride);
    for (size_t i = 0; i < depths; ++i) pitch = std::gcd(pitch, other.levels_[i].stride);
    const int64_t after = (int64_t(there - at) % pitch + pitch) % pitch;
    return after >= run_ && after + other.run_ <= pitch;
  }

  // Whether the first `depth` levels, from `at` on, have a byte in [from, to).
  bool meets_range(size_t depth, uintptr_t at, uintptr_t from, uintptr_t to) const {
    const auto bytes = uintptr_t(extent(depth));
    if (at >= to || from >= at + bytes) return false;
    if (depth == 0) return true;
    const auto stride = uintptr_t(levels_[depth - 1].stride), inner = uintptr_t(extent(depth - 1));
    const uintptr_t first = from < at + inner ? 0 : (from - at - inner) / stride + 1;
    const uintptr_t last = std::min<uintptr_t>(uintptr_t(levels_[depth - 1].count) - 1, (to - 1 - at) / stride);
    if (first + 1 < last) return true;  // those between the outer two lie in the range as a whole
    for (uintptr_t i = first; i <= last; ++i)
      if (meets_range(depth - 1, at + i * stride, from, to)) return true;
    return false;
  }

  uintptr_t begin_;
  int64_t run_;  // 0: no element
  std::vector<Level> levels_;
};

// The bytes from a tensor's first element to behind its last.
inline uintptr_t span_bytes(const Tensor& t) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return 0;
    last += (t.size(i) - 1) * t.stride(i);
  }
  return uintptr_t((last + 1) * int64_t(t.element_size()));
}

inline bool share_memory(const Tensor& a, const Tensor& b) {
  const auto first = reinterpret_cast<uintptr_t>(a.const_data_ptr()),
             second = reinterpret_cast<uintptr_t>(b.const_data_ptr());
  if (first >= second + span_bytes(b) || second >= first + span_bytes(a)) return false;  // nearly always
  return Footprint(a).meets(Footprint(b));
}

}  // namespace vdit

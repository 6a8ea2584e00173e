// CPU twin of kernels/select/block_mean.h.
#pragma once
#include <string>
#include <vector>

#include "cpu/block_mean_part.h"

namespace vdit {

// The parts of all blocks of all heads, and room for the sums of blocks with more than one.
class BlockMeanSchedule {
 public:
  explicit BlockMeanSchedule(const BlockMeanParams& p);
  const std::string& error() const { return error_; }  // about the lengths; empty: none
  int64_t size() const { return parts_before_.back(); }
  BlockMeanWork work(int64_t i);  // 0 ... size() - 1
  void add_parts();               // after all of them: means of the blocks with more than one

 private:
  struct Part {
    int64_t first, slot;  // slot: of its sum, counted from the first of its head; -1: the only part
    int32_t count, block;
  };
  size_t row_of(int64_t bh) const;  // row of lengths of a batch item and head

  const BlockMeanParams& p_;
  std::string error_;
  std::vector<Part> parts_;                                       // of one row of lengths after the other
  std::vector<int64_t> row_begin_, row_slots_;                    // per row of lengths
  std::vector<int64_t> parts_before_ = {0}, slots_before_ = {0};  // per batch item and head
  std::vector<float> sums_;
  std::vector<int32_t> counted_;
};

}  // namespace vdit

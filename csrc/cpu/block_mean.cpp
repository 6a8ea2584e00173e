#include "cpu/block_mean.h"

#include <algorithm>

#include "cpu/features.h"

namespace vdit_generic {
bool block_mean_part(const vdit::BlockMeanParams& p, const vdit::BlockMeanWork& work);
}
#if defined(VDIT_X86)
namespace vdit_avx2 {
bool block_mean_part(const vdit::BlockMeanParams& p, const vdit::BlockMeanWork& work);
}
namespace vdit_avx512 {
bool block_mean_part(const vdit::BlockMeanParams& p, const vdit::BlockMeanWork& work);
}
#endif

namespace vdit {

bool cpu_block_mean_part(const BlockMeanParams& p, const BlockMeanWork& work) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::block_mean_part(p, work);
    case Isa::avx2: return vdit_avx2::block_mean_part(p, work);
#endif
    default: return vdit_generic::block_mean_part(p, work);
  }
}

BlockMeanSchedule::BlockMeanSchedule(const BlockMeanParams& p) : p_(p) {
  for (int64_t b = 0; b < p.lengths_batch; ++b) {
    for (int64_t h = 0; h < p.lengths_heads; ++h) {
      row_begin_.push_back(static_cast<int64_t>(parts_.size()));
      int64_t first = 0, slots = 0;
      for (int32_t i = 0; i < p.blocks; ++i) {
        const int64_t at = b * p.lengths.batch_stride + h * p.lengths.head_stride + i * p.lengths.stride;
        const int64_t n = p.lengths.bytes == 8 ? static_cast<const int64_t*>(p.lengths.data)[at]
                                               : static_cast<const int32_t*>(p.lengths.data)[at];
        if (n < 0 || n > p.tokens - first) {
          const std::string where = std::to_string(b) + ", " + std::to_string(h) + ", " + std::to_string(i) + "]";
          error_ = "lengths[" + where + " is " + std::to_string(n) +
                   "; lengths are at least 0 and sum to at most the " + std::to_string(p.tokens) + " tokens";
          return;
        }
        const bool whole = n <= kBlockMeanPart;
        for (int64_t done = 0; done < std::max<int64_t>(n, 1); done += kBlockMeanPart)
          parts_.push_back(
              {first + done, whole ? -1 : slots++, int32_t(std::min<int64_t>(n - done, kBlockMeanPart)), i});
        first += n;
      }
      row_slots_.push_back(slots);
    }
  }
  row_begin_.push_back(static_cast<int64_t>(parts_.size()));
  for (int64_t bh = 0; bh < int64_t{p.batch} * p.heads; ++bh) {
    const size_t row = row_of(bh);
    parts_before_.push_back(parts_before_.back() + row_begin_[row + 1] - row_begin_[row]);
    slots_before_.push_back(slots_before_.back() + row_slots_[row]);
  }
  sums_.resize(static_cast<size_t>(slots_before_.back() * p.dim));
  counted_.resize(static_cast<size_t>(slots_before_.back()));
}

size_t BlockMeanSchedule::row_of(int64_t bh) const {
  const int64_t b = p_.lengths_batch == 1 ? 0 : bh / p_.heads, h = p_.lengths_heads == 1 ? 0 : bh % p_.heads;
  return static_cast<size_t>(b * p_.lengths_heads + h);
}

BlockMeanWork BlockMeanSchedule::work(int64_t i) {
  const auto after = std::upper_bound(parts_before_.begin(), parts_before_.end(), i);
  int64_t bh = after - parts_before_.begin() - 1, index = i - *(after - 1);
  if (p_.lengths_heads == 1) {  // the same part of all heads, one after the other: their rows are neighbours in memory
    const int64_t first = bh / p_.heads * p_.heads;
    index = i - parts_before_[static_cast<size_t>(first)];
    bh = first + index % p_.heads;
    index /= p_.heads;
  }
  const Part& part = parts_[static_cast<size_t>(row_begin_[row_of(bh)] + index)];
  const bool whole = part.slot < 0;
  const int64_t to = whole ? bh * p_.blocks + part.block : slots_before_[static_cast<size_t>(bh)] + part.slot;
  return {bh / p_.heads,
          bh % p_.heads,
          part.first,
          part.count,
          (whole ? p_.means : sums_.data()) + to * p_.dim,
          (whole ? p_.counts : counted_.data()) + to,
          whole};
}

void BlockMeanSchedule::add_parts() {
  for (int64_t bh = 0; bh < int64_t{p_.batch} * p_.heads; ++bh) {
    const size_t row = row_of(bh);
    int32_t block = -1;  // that is being added up
    for (int64_t i = row_begin_[row]; i < row_begin_[row + 1]; ++i) {
      const Part& part = parts_[static_cast<size_t>(i)];
      if (part.slot < 0) continue;
      const int64_t from = slots_before_[static_cast<size_t>(bh)] + part.slot, to = bh * p_.blocks + part.block;
      const float* sum = sums_.data() + from * p_.dim;
      float* mean = p_.means + to * p_.dim;
      if (part.block != block) {
        std::copy(sum, sum + p_.dim, mean);
        p_.counts[to] = counted_[static_cast<size_t>(from)];
      } else {
        for (int d = 0; d < p_.dim; ++d) mean[d] += sum[d];
        p_.counts[to] += counted_[static_cast<size_t>(from)];
      }
      block = part.block;
      const bool last = i + 1 == row_begin_[row + 1] || parts_[static_cast<size_t>(i + 1)].block != block;
      if (last && p_.counts[to] > 1)
        for (int d = 0; d < p_.dim; ++d) mean[d] /= float(p_.counts[to]);
    }
  }
}

}  // namespace vdit

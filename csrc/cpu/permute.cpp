#include "cpu/permute.h"

#include <cstring>
#include <vector>

namespace vdit {

bool cpu_permute_tokens(const PermuteParams& p, int64_t first, int64_t last) {
  const auto* x = static_cast<const char*>(p.x.data);
  auto* out = static_cast<char*>(p.out);
  const int64_t row_bytes = int64_t{p.dim} * p.element_bytes;
  bool in_range = true;
  int64_t h = first % p.heads, position = first / p.heads % p.tokens, b = first / p.heads / p.tokens;
  for (int64_t i = first; i < last; ++i) {
    const int32_t token = static_cast<const int32_t*>(
        p.order.data)[b * p.order.batch_stride + h * p.order.head_stride + position * p.order.stride];
    if (token >= 0 && token < p.tokens) {
      const int64_t from = p.inverse != 0 ? position : token, to = p.inverse != 0 ? token : position;
      const int64_t at = b * p.x.batch_stride + from * p.x.row_stride + h * p.x.head_stride;
      std::memcpy(out + ((b * p.tokens + to) * p.heads + h) * row_bytes, x + at * p.element_bytes,
                  static_cast<size_t>(row_bytes));
    } else {
      in_range = false;
    }
    if (++h < p.heads) continue;
    h = 0;
    if (++position < p.tokens) continue;
    position = 0;
    ++b;
  }
  return in_range;
}

int32_t cpu_repeated_token(const PermuteParams& p, int64_t b, int64_t h) {
  const int32_t* order = static_cast<const int32_t*>(p.order.data) + b * p.order.batch_stride + h * p.order.head_stride;
  std::vector<uint64_t> seen((static_cast<size_t>(p.tokens) + 63) / 64);
  for (int64_t position = 0; position < p.tokens; ++position) {
    const int32_t token = order[position * p.order.stride];
    if (token < 0 || token >= p.tokens) continue;
    uint64_t& word = seen[static_cast<size_t>(token) / 64];
    const uint64_t bit = uint64_t{1} << token % 64;
    if ((word & bit) != 0) return token;
    word |= bit;
  }
  return -1;
}

}  // namespace vdit

// CPU twin of kernels/select/permute.h.
#pragma once
#include "kernels/select/permute.h"

namespace vdit {

// Rows [first, last) of B * N * H, numbered as (b * N + n) * H + h. Returns whether every order entry was in range;
// rows of others are not written. Safe to call from many threads.
bool cpu_permute_tokens(const PermuteParams& p, int64_t first, int64_t last);

}  // namespace vdit

// CPU twin of kernels/select/permute.h.
#pragma once
#include "kernels/select/permute.h"

namespace vdit {

// Rows [first, last) of B * N * H, numbered as (b * N + n) * H + h. Returns whether every order entry was in range;
// rows of others are not written. Safe to call from many threads.
bool cpu_permute_tokens(const PermuteParams& p, int64_t first, int64_t last);

// A token that the order of head h of item b names twice, or -1. Entries out of range are passed over.
int32_t cpu_repeated_token(const PermuteParams& p, int64_t b, int64_t h);

}  // namespace vdit

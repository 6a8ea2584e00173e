// CPU twin of kernels/merge.h.
#pragma once
#include "kernels/merge.h"

namespace vdit {

// Merges rows [first, last) of the B * L * H rows, numbered as (b * L + l) * H + h. Safe to call from many threads.
void cpu_merge(const MergeParams& params, int64_t first, int64_t last);

}  // namespace vdit

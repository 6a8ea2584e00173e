// CPU twin of kernels/select/select.h.
#pragma once
#include "kernels/select/select.h"

namespace vdit {

// Selects in rows [first, last); `buffer` has room for 2 * n numbers. Safe to call from many threads.
void cpu_select(const SelectParams& params, int64_t first, int64_t last, uint32_t* buffer);

}  // namespace vdit

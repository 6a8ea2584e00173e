// CPU twin of kernels/select/counting_sort.h.
#pragma once
#include "kernels/select/counting_sort.h"

namespace vdit {

// Sorts sequences [first, last) of B * H. Safe to call from many threads. `cursor`: p.classes entries of the caller's.
void cpu_counting_sort(const CountingSortParams& p, int64_t first, int64_t last, int32_t* cursor);

}  // namespace vdit

// CPU twin of kernels/fused/combine_rows.h.
#pragma once
#include "kernels/fused/combine_rows.h"

namespace vdit {

// Rows [first, last) of the result. Safe to call from many threads.
void cpu_combine_rows(const CombineRowsParams& params, int64_t first, int64_t last);

}  // namespace vdit

// CPU twin of kernels/fused/adaln.h.
#pragma once
#include "kernels/fused/adaln.h"

namespace vdit {

// fp32 rows that cpu_adaln needs as scratch.
constexpr int kAdaLNScratchRows = 9;

// Rows [first, last) of the B * N rows, numbered b * N + n. `scratch`: kAdaLNScratchRows rows of dim rounded up to 16
// floats, of this call's own. Indices must lie inside their tables. Safe to call from many threads.
void cpu_adaln(const AdaLNParams& params, int64_t first, int64_t last, float* scratch);

}  // namespace vdit

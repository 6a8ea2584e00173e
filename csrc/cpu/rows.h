// CPU twin of kernels/rows/rows.h.
#pragma once
#include "kernels/rows/rows.h"

namespace vdit {

// Rows [first, last) of pairs * batch * slots, numbered (pair * batch + b) * slots + slot. Return whether the row of
// every slot in use was in range; others are left out. Safe to call from many threads where rows are distinct.
bool cpu_gather_rows(const RowsParams& p, int64_t first, int64_t last);
bool cpu_scatter_rows(const RowsParams& p, int64_t first, int64_t last);

// A row that two slots in use of item b name, kRowOutside if one is outside the tensor, or -1.
constexpr int32_t kRowOutside = -2;
int32_t cpu_repeated_row(const RowsParams& p, int64_t b);

// One row of `scatter`: x = (add ? x : 0) + gate * y, in fp32. `gate` may be null; `channel` is its stride, 0 or 1.
struct RowBlend {
  DType dtype;
  void* x;
  const void* y;
  int64_t width;
  int32_t add;
  const void* gate;
  DType gate_dtype;
  int64_t channel;
};
void cpu_blend_row(const RowBlend& r);

}  // namespace vdit

// CPU twin of kernels/pack/pack.h.
#pragma once
#include "kernels/pack/pack.h"

namespace vdit {

// Rows [first, last) of the batch * rows of a slice, from the tensor to the buffer or back. Safe to call from many
// threads with rows of their own; whoever has the first row clears the ends of codes and scales.
void cpu_pack_rows(const PackParams& p, int32_t tensor, int32_t slice, int64_t first, int64_t last);
void cpu_unpack_rows(const PackParams& p, int32_t tensor, int32_t slice, int64_t first, int64_t last);

// One head of D channels, compressed. `packed`: D numbers in bf16, or D codes; `scales`: one byte per block.
struct PackHead {
  DType dtype;
  PackFormat format;
  void* x;
  void* packed;
  uint8_t* scales;
  int32_t dim, block;
};
void cpu_compress_head(const PackHead& h);
void cpu_expand_head(const PackHead& h);

}  // namespace vdit

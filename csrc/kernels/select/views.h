// Strided tensors as the cluster operators get them. No framework types, no CUDA types.
#pragma once
#include <cstdint>

#include "kernels/types.h"

namespace vdit {

// [B, N, H, D] of any element type: strides in elements, the last dimension contiguous.
struct TokenRows {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

// int32 or int64 [B, H, n]; strides in elements, 0 where a dimension is broadcast. data == nullptr: not given.
struct TokenInts {
  const void* data;
  int64_t batch_stride, head_stride, stride;
  int32_t bytes;  // of an entry: 4 or 8
};

}  // namespace vdit

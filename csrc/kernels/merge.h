// Merge of partial attention results over disjoint key sets, by their log-sum-exp (FlashDecoding's reduction).
//
//   lse[b,h,l]   = log sum_i exp(lse_i[b,h,l])
//   out[b,l,h,:] = sum_i exp(lse_i[b,h,l] - lse[b,h,l]) * out_i[b,l,h,:]        (fp32 arithmetic)
//
// A row whose parts all have lse -inf gets out 0 and lse -inf. NaN and +inf go through the formula unchanged.
#pragma once
#include "kernels/types.h"

namespace vdit {

constexpr int kMergeMaxParts = 32;  // MergeParams is a kernel argument: it must stay below 4 KB

struct MergePart {
  const void* out;        // [B, L, H, D], element type MergeParams::dtype
  const float* lse;       // [B, H, L]
  int64_t out_stride[4];  // elements, in the order B, L, H, D
  int64_t lse_stride[3];  // elements, in the order B, H, L
};

struct MergeParams {
  int64_t batch, length, heads, dim;
  DType dtype;
  int32_t parts;  // 1 .. kMergeMaxParts
  MergePart part[kMergeMaxParts];
  void* out;   // contiguous [B, L, H, D], dtype
  float* lse;  // contiguous [B, H, L]
};

static_assert(sizeof(MergeParams) < 4096, "CUDA kernel arguments are limited to 4 KB");

// Launches on `stream` (a cudaStream_t) of the current device; returns 0 or the cudaError_t of the launch.
int cuda_merge(const MergeParams& params, void* stream);

}  // namespace vdit

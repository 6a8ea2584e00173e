// The nearest centroid of every token: argmin over c of |c|^2 - 2 x.c in fp32, the lowest index among equals.
#pragma once
#include <cstddef>

#include "kernels/select/views.h"

namespace vdit {

constexpr int kKmeansMaxDim = 256;

struct KmeansParams {
  TokenRows x;       // [B, N, H, D]
  TokenRows centre;  // fp32; the strides of [B, H, C, D] as batch, row (C) and head; rounded to `dtype` before use
  int32_t batch, tokens, heads, dim, centres;  // dim 1 ... kKmeansMaxDim, centres >= 1
  DType dtype;                                 // of x; CUDA: f16 or bf16
  int32_t* labels;                             // contiguous [B, H, N]
};

// CUDA: launches on `stream` (a cudaStream_t); returns 0 or a cudaError_t.
size_t kmeans_workspace_bytes(const KmeansParams& params);
int cuda_kmeans_assign(const KmeansParams& params, void* workspace, size_t bytes, void* stream);

}  // namespace vdit

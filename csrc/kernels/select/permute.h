// Rows of tokens in permuted order and back.
#pragma once
#include "kernels/select/views.h"

namespace vdit {

struct PermuteParams {
  TokenRows x;      // [B, N, H, D]
  TokenInts order;  // int32 [B, H, N], a permutation
  int32_t batch, tokens, heads, dim;
  int32_t element_bytes;  // 2 or 4
  int32_t inverse;        // 0: out[p] = x[order[p]]; 1: out[order[p]] = x[p]
  void* out;              // contiguous [B, N, H, D]
};

// CUDA: launches on `stream` (a cudaStream_t); returns 0 or a cudaError_t. Orders outside [0, N): wrong rows, no access
// outside the tensors. With `inverse`, rows that the order does not name are not written.
int cuda_permute_tokens(const PermuteParams& params, void* stream);

}  // namespace vdit

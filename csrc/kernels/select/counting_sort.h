// The order that brings equal labels together: lowest label first, equal ones by position. Labels outside
// [0, classes) are clamped into it.
#pragma once
#include <cstddef>

#include "kernels/select/views.h"

namespace vdit {

struct CountingSortParams {
  TokenInts labels;  // int32 [B, H, N]
  int32_t batch, heads, tokens, classes;
  int32_t* order;   // contiguous [B, H, N]
  int32_t* counts;  // contiguous [B, H, classes]
};

// CUDA: launches on `stream` (a cudaStream_t); returns 0 or a cudaError_t.
size_t counting_sort_workspace_bytes(const CountingSortParams& params);
int cuda_counting_sort(const CountingSortParams& params, void* workspace, size_t bytes, void* stream);

}  // namespace vdit

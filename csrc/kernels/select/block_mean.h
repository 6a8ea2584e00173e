// Means of the tokens of blocks of a (permuted) sequence. A block is cut into parts of kBlockMeanPart positions; a part
// is summed by one worker and the parts of a block are added in order, so that long blocks do not wait for one worker
// and sums do not depend on who computes them.
#pragma once
#include <cstddef>

#include "kernels/select/views.h"

namespace vdit {

constexpr int kBlockMeanPart = 128;

struct BlockMeanParams {
  TokenRows x;        // [B, N, H, D]
  TokenInts lengths;  // [B, H, n]: block i holds the next lengths[i] positions
  TokenInts order;    // int32 [B, H, N]: position p holds token order[p]; data == nullptr: p
  TokenInts kv_len;   // [B]: tokens at or above it are left out; data == nullptr: none is
  int32_t batch, tokens, heads, dim, blocks;
  int32_t lengths_batch, lengths_heads;  // of `lengths` before broadcasting: 1, or batch and heads
  DType dtype;                           // of x
  float* means;                          // contiguous [B, H, n, D]; 0 for a block without tokens
  int32_t* counts;                       // contiguous [B, H, n]: how many tokens were averaged
};

// CUDA: launches on `stream` (a cudaStream_t); returns 0 or a cudaError_t. Lengths and orders are clamped.
size_t block_mean_workspace_bytes(const BlockMeanParams& params);
int cuda_block_mean(const BlockMeanParams& params, void* workspace, size_t bytes, void* stream);

}  // namespace vdit

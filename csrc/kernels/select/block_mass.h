// Search passes over the scores of attention, without values: log-sum-exps of query rows, and attention weights summed
// over blocks (AdaSpa, arXiv 2502.21079; with fold > 1 XAttention's antidiagonals, arXiv 2503.16428).
//
// Folded query i is the rows i*fold + fold-1-r of q side by side, folded key j the rows j*fold + r of k, r = 0 ...
// fold-1. Rows that do not exist, or at or above q_len or kv_len, are zeros; a folded key of no valid row is not read,
// and the log-sum-exp of a folded query of no valid row is -inf.
//
// No framework and no CUDA types. `stream` is an arch::stream_t (a cudaStream_t). Nothing is read back to the host,
// nothing is added atomically: the same bits every time.
#pragma once
#include <cstdint>

#include "kernels/attention/params.h"

namespace vdit::gpu {

struct Lengths {
  const void* of;  // [B] or null: all rows; clamped to 0 ... rows
  int32_t bytes;   // 4 or 8 per entry
};

struct ScoreParams {
  Rows q, k;
  int32_t batch, heads, kv_heads, dim, lq, lk, fold;
  DType dtype;  // f16 or bf16
  float scale;
  Lengths q_len, kv_len;
};

// lse: contiguous [B, H, ceil(lq / fold)], natural logarithm, -inf where no key is valid. Returns 0 or a CUDA error.
int score_lse(const ScoreParams& params, float* lse, void* stream);

// lse as above, rows of -inf have weight 0. mass: contiguous [B, H, ceil(lq / fold / q_block), ceil(lk / fold /
// kv_block)], sums of exp(score - lse). Returns 0 or a CUDA error.
int block_mass(const ScoreParams& params, const float* lse, int64_t q_block, int64_t kv_block, float* mass,
               void* stream);

// block_mass with the log-sum-exps of these keys, which it writes to lse first. Returns 0 or a CUDA error.
int softmax_mass(const ScoreParams& params, int64_t q_block, int64_t kv_block, float* lse, float* mass, void* stream);

}  // namespace vdit::gpu

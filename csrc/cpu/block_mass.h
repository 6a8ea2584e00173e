// Log-sum-exps of scores, and attention weights summed over blocks, without values. No framework types.
//
// Folded query i is the rows i*fold + fold-1-r of q, folded key j the rows j*fold + r of k, r = 0 ... fold-1: a score
// is the sum of `fold` products of head_dim (XAttention, arXiv 2503.16428). Rows that do not exist count as zeros.
#pragma once

#include <cstdint>

#include "cpu/attention.h"

namespace vdit {

struct ScoreParams {
  View4 q, k;
  float scale = 1.f;
  int64_t fold = 1;
  const int64_t* kv_len = nullptr;  // [B] or null
  const int64_t* q_len = nullptr;   // [B] or null

  int64_t queries() const { return (q.size[1] + fold - 1) / fold; }
  int64_t keys() const { return (k.size[1] + fold - 1) / fold; }
};

// lse: [B, H, queries], natural logarithm.
void score_lse_cpu(const ScoreParams& p, float* lse, const ParallelFor& parallel);

struct BlockMassParams {
  ScoreParams scores;
  const float* lse = nullptr;         // [B, H, queries]
  int64_t q_block = 1, kv_block = 1;  // at least 1, and at most max(1, queries) and max(1, keys)
};

// mass: [B, H, ceil(queries / q_block), ceil(keys / kv_block)].
void block_mass_cpu(const BlockMassParams& p, float* mass, const ParallelFor& parallel);

// The same with the log-sum-exps of these keys, in one pass; p.lse is not read. Queries without a row below q_len have
// weight 0.
void softmax_mass_cpu(const BlockMassParams& p, float* mass, const ParallelFor& parallel);

}  // namespace vdit

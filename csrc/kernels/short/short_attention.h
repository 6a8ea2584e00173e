// Attention over very many very short sequences: one for every batch item, place and head.
//
//   out[b,i,s,h,:] = sum_j softmax_j(scale * q[b,i,s,h,:] . k[b,j,s,h,:]) * v[b,j,s,h,:]          (fp32 arithmetic)
//
// Row i reads the keys j < kv_len[b], with `causal` also only j <= i + lk - lq. A row that reads no key, or only keys
// of score -inf, gets 0. Keys a row does not read never reach it, whatever they hold. lk == 1 copies v.
#pragma once
#include "kernels/types.h"

namespace vdit {

constexpr int kShortMaxKeys = 64;
constexpr int kShortMaxDim = 256;

// Element strides, in the order batch, row, place, head, column.
struct ShortView {
  const void* data;
  int64_t stride[5];
};

struct ShortAttentionParams {
  int64_t batch, places;
  int32_t heads, lq, lk, dim;
  DType dtype;
  int32_t causal;
  float scale;
  int32_t kv_len_bytes;    // of an entry: 4 or 8
  ShortView q, k, v, out;  // out.data is written
  const void* kv_len;      // int32 or int64 [batch]; nullptr: every key exists
  int64_t kv_len_stride;
};

// Launches on `stream` (a cudaStream_t) of the current device; returns 0 or a cudaError_t.
int cuda_short_attention(const ShortAttentionParams& params, void* stream);

}  // namespace vdit

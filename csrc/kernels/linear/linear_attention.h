// Normalised linear attention: a state per head in place of the matrix of weights.
//
//   state[b,h,f,c]  = sum_j phi(k[b,j,h])[f] * v[b,j,h,c]     c < dim_v, j < kv_len[b]
//   state[b,h,f,dim_v] = sum_j phi(k_den[b,j,h])[f]
//   out[b,i,h,c] = phi(q[b,i,h]) . state[b,h/group,:,c] / (phi(q_den[b,i,h]) . state[b,h/group,:,dim_v] + eps)
//
// 0 where that sum is exactly 0. fp32 arithmetic; on tensor cores features are rounded to the dtype of the tokens.
#pragma once
#include <cstddef>

#include "kernels/select/views.h"

namespace vdit {

constexpr int kLinearMaxDim = 256;  // of keys and of values

enum class FeatureMap : int32_t { hedgehog = 0, relu = 1, elu = 2, identity = 3 };

// How many features a row of `dim` columns has: hedgehog is softmax(x W) beside softmax(-x W).
constexpr int feature_count(FeatureMap map, int dim) { return map == FeatureMap::hedgehog ? 2 * dim : dim; }

// W [heads, dim, dim], the last dimension contiguous; head_stride 0: one for all. data == nullptr: no projection.
struct LinearWeight {
  const void* data;
  int64_t head_stride, row_stride;
  DType dtype;
};

struct LinearStateParams {
  TokenRows k, v;
  TokenRows k_den;  // data == nullptr: k
  LinearWeight weight;
  TokenInts kv_len;
  int32_t batch, heads, length, dim, dim_v;
  DType dtype;
  FeatureMap map;
  float* state;  // [batch, heads, features, dim_v + 1]
};

struct LinearReadoutParams {
  TokenRows q;
  TokenRows q_den;  // data == nullptr: q
  LinearWeight weight;
  const float* state;  // [batch, kv_heads, features, dim_v + 1]
  int32_t batch, heads, kv_heads, length, dim, dim_v;
  DType dtype;
  FeatureMap map;
  float eps;
  void* out;  // [batch, length, heads, dim_v]
};

// CUDA: how many parts a sequence is cut into, given the number of multiprocessors. A function of its arguments alone.
int32_t linear_state_splits(const LinearStateParams& params, int32_t processors);
// Parts are added in their order. `workspace`: linear_state_workspace floats, unused for one part.
size_t linear_state_workspace(const LinearStateParams& params, int32_t splits);
// Launch on `stream` (a cudaStream_t) of the current device; return 0 or a cudaError_t.
int cuda_linear_state(const LinearStateParams& params, int32_t splits, float* workspace, void* stream);
int cuda_linear_readout(const LinearReadoutParams& params, int32_t processors, void* stream);

}  // namespace vdit

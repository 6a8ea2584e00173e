// The state of linear attention: which kernel, in how many parts, and their sum.
#include <algorithm>

#include "kernels/linear/plain.h"

namespace vdit::gpu::linear {

constexpr int kSumThreads = 256;

// to[i] = sum of the parts' values, in their order.
VD_KERNEL(kSumThreads, 4)
sum_parts(const float* VD_RESTRICT parts, int32_t splits, int64_t count, float* VD_RESTRICT to) {
  const int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (i >= count) return;
  float sum = parts[i];
  for (int32_t s = 1; s < splits; ++s) sum += parts[s * count + i];
  to[i] = sum;
}

bool on_tensor_cores(const LinearStateParams& p) {
  return matrix_dims(p.dtype, p.dim, p.dim_v) && (p.map != FeatureMap::hedgehog || p.k_den.data == nullptr) &&
         rows_aligned(p.k, p.batch, p.length, p.heads) && rows_aligned(p.v, p.batch, p.length, p.heads) &&
         (p.k_den.data == nullptr || rows_aligned(p.k_den, p.batch, p.length, p.heads));
}

int64_t state_floats(const LinearStateParams& p) {
  return int64_t(p.batch) * p.heads * feature_count(p.map, p.dim) * (p.dim_v + 1);
}

template <class T>
int launch_matrix(const StateArgs& a, arch::stream_t stream) {
  const bool small = a.p.dim <= 64 && a.p.dim_v <= 64;
  if (a.p.map == FeatureMap::hedgehog)
    return small ? launch_state_matrix<T, 64, true>(a, stream) : launch_state_matrix<T, 128, true>(a, stream);
  return small ? launch_state_matrix<T, 64, false>(a, stream) : launch_state_matrix<T, 128, false>(a, stream);
}

}  // namespace vdit::gpu::linear

namespace vdit {

int32_t linear_state_splits(const LinearStateParams& p, int32_t processors) {
  using namespace gpu::linear;
  const bool matrix = on_tensor_cores(p), small = p.dim <= 64 && p.dim_v <= 64;
  const int64_t resident = !matrix ? 1 : p.map == FeatureMap::hedgehog ? (small ? 2 : 1) : (small ? 4 : 2);
  // A part writes its state and has it read again: as many bytes as about that many stages of keys and values.
  const int64_t stages = (int64_t{p.length} + kStageTokens - 1) / kStageTokens, fixed = 8;
  return parts_for(int64_t{p.batch} * p.heads, stages, resident * processors, fixed, 256);
}

size_t linear_state_workspace(const LinearStateParams& p, int32_t splits) {
  return splits > 1 ? size_t(gpu::linear::state_floats(p)) * size_t(splits) : 0;
}

int cuda_linear_state(const LinearStateParams& p, int32_t splits, float* workspace, void* stream) {
  using namespace gpu::linear;
  if (p.dim < 1 || p.dim > kLinearMaxDim || p.dim_v < 1 || p.dim_v > kLinearMaxDim || splits < 1) return kInvalid;
  const int64_t count = state_floats(p);
  if (count == 0) return 0;
  const auto s = static_cast<arch::stream_t>(stream);
  const bool matrix = on_tensor_cores(p);
  const int tokens = matrix ? kStageTokens : plain::kTokens;
  const StateArgs a{p, splits, int32_t((int64_t{p.length} + tokens - 1) / tokens), splits > 1 ? workspace : p.state};
  int code = kInvalid;
  switch (p.dtype) {
    case DType::f32: code = plain::launch_state<F32>(a, s); break;
    case DType::f16: code = matrix ? launch_matrix<arch::F16>(a, s) : plain::launch_state<arch::F16>(a, s); break;
    case DType::bf16: code = matrix ? launch_matrix<arch::BF16>(a, s) : plain::launch_state<arch::BF16>(a, s); break;
  }
  if (code != 0 || splits == 1) return code;
  const int64_t blocks = (count + kSumThreads - 1) / kSumThreads;
  if (blocks > INT32_MAX) return kInvalid;
  return arch::launch(sum_parts, dim3(unsigned(blocks)), dim3(kSumThreads), 0, s, workspace, splits, count, p.state);
}

}  // namespace vdit

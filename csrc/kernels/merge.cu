#include "kernels/merge.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

namespace vdit {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;  // one warp per row

// Lane i ends up with the weight of part i: parts fit into one warp, so the softmax over them is two shuffles trees.
// `seen`: whether this lane's part read any key in this row; one that did not may hold anything.
__device__ float row_weights(const MergeParams& p, int64_t b, int64_t l, int64_t h, int lane, float& lse, bool& seen) {
  const float none = -INFINITY;
  float x = none;
  if (lane < p.parts) {
    const MergePart& part = p.part[lane];
    x = part.lse[b * part.lse_stride[0] + h * part.lse_stride[1] + l * part.lse_stride[2]];
  }
  seen = x != none;
  float top = x;  // fmaxf drops a NaN, but the sum below brings it back
  for (int step = kWarp / 2; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  const bool infinite = top == none || top == INFINITY;
  const float shift = top == none ? 0.0f : top;
  float e = expf(x - shift);
  float sum = e;
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const bool any_nan = __any_sync(~0u, isnan(x));
  lse = any_nan ? NAN : infinite ? top : top + logf(sum);
  return top == none && !any_nan ? 0.0f : e / sum;
}

template <class T>
__global__ void __launch_bounds__(kWarp* kRowsPerBlock) merge_kernel(const __grid_constant__ MergeParams p) {
  const int lane = threadIdx.x % kWarp;
  const int64_t rows = p.batch * p.length * p.heads;
  const int64_t first = blockIdx.x * int64_t(kRowsPerBlock) + threadIdx.x / kWarp;
  for (int64_t row = first; row < rows; row += int64_t(gridDim.x) * kRowsPerBlock) {
    const int64_t h = row % p.heads;
    const int64_t l = row / p.heads % p.length;
    const int64_t b = row / p.heads / p.length;
    float lse;
    bool seen;
    const float weight = row_weights(p, b, l, h, lane, lse, seen);
    const unsigned parts_seen = __ballot_sync(~0u, seen);
    if (lane == 0) p.lse[(b * p.heads + h) * p.length + l] = lse;
    T* out = static_cast<T*>(p.out) + row * p.dim;
    for (int64_t base = 0; base < p.dim; base += kWarp) {  // every lane stays in: the shuffles need the whole warp
      const int64_t d = base + lane;
      float sum = 0.0f;
      for (int i = 0; i < p.parts; ++i) {
        const float w = __shfl_sync(~0u, weight, i);
        if (d >= p.dim || (parts_seen >> i & 1u) == 0) continue;
        const MergePart& part = p.part[i];
        const int64_t at = b * part.out_stride[0] + l * part.out_stride[1] + h * part.out_stride[2];
        sum += w * float(static_cast<const T*>(part.out)[at + d * part.out_stride[3]]);
      }
      if (d < p.dim) out[d] = T(sum);
    }
  }
}

template <class T>
int launch(const MergeParams& p, cudaStream_t stream) {
  const int64_t rows = p.batch * p.length * p.heads;
  if (rows == 0) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>((rows + kRowsPerBlock - 1) / kRowsPerBlock, 1 << 20);
  merge_kernel<T><<<unsigned(blocks), kWarp * kRowsPerBlock, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

int cuda_merge(const MergeParams& params, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (params.dtype) {
    case DType::f32: return launch<float>(params, s);
    case DType::f16: return launch<__half>(params, s);
    case DType::bf16: return launch<__nv_bfloat16>(params, s);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vdit

// What the kernels of linear attention share: views, lengths, feature maps of single values, weights of one head.
#pragma once
#include "arch/arch.h"
#include "kernels/linear/linear_attention.h"

namespace vdit::gpu::linear {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kInvalid = 1;  // cudaErrorInvalidValue

struct F32;

// A value of a tensor of type T, and back.
template <class T>
struct Scalar {
  static constexpr int kBytes = 2;
  VD_STATIC_METHOD float load(const void* data, int64_t at) {
    float low, high;
    arch::unpack<T>(static_cast<const uint16_t*>(data)[at], low, high);
    return low;
  }
  VD_STATIC_METHOD void store(void* data, int64_t at, float x) {
    static_cast<uint16_t*>(data)[at] = uint16_t(arch::pack<T>(x, 0.f));
  }
};
template <>
struct Scalar<F32> {
  static constexpr int kBytes = 4;
  VD_STATIC_METHOD float load(const void* data, int64_t at) { return static_cast<const float*>(data)[at]; }
  VD_STATIC_METHOD void store(void* data, int64_t at, float x) { static_cast<float*>(data)[at] = x; }
};

// Entry (row, column) of W of a head; of the unit matrix where there is none.
VD_DEV float weight_at(const LinearWeight& w, int32_t head, int row, int column) {
  if (w.data == nullptr) return row == column ? 1.f : 0.f;
  const int64_t at = head * w.head_stride + row * w.row_stride + column;
  if (w.dtype == DType::f32) return Scalar<F32>::load(w.data, at);
  return w.dtype == DType::bf16 ? Scalar<arch::BF16>::load(w.data, at) : Scalar<arch::F16>::load(w.data, at);
}

// NaN stays NaN.
VD_DEV float mapped(FeatureMap map, float x) {
  if (map == FeatureMap::relu) return x < 0.f ? 0.f : x;
  if (map == FeatureMap::elu) return x > 0.f ? x + 1.f : arch::ex2(x * kLog2e);
  return x;
}

template <class T>
VD_DEV uint32_t mapped_pair(FeatureMap map, uint32_t pair) {
  if (map == FeatureMap::identity) return pair;
  float low, high;
  arch::unpack<T>(pair, low, high);
  return arch::pack<T>(mapped(map, low), mapped(map, high));
}

VD_DEV int32_t valid_tokens(const TokenInts& lengths, int32_t batch, int32_t most) {
  if (lengths.data == nullptr) return most;
  const int64_t at = batch * lengths.batch_stride;
  const int64_t n = lengths.bytes == 8 ? static_cast<const int64_t*>(lengths.data)[at]
                                       : int64_t(static_cast<const int32_t*>(lengths.data)[at]);
  return n < 0 ? 0 : n < most ? int32_t(n) : most;
}

// First element of a token's row.
VD_DEV int64_t row_offset(const TokenRows& x, int32_t batch, int32_t head, int64_t token) {
  return batch * x.batch_stride + head * x.head_stride + token * x.row_stride;
}

// Rows as 16-byte chunks, swizzled so that the 8 rows that one ldmatrix phase reads lie in different banks.
template <int kChunks>
VD_DEV uint32_t chunk_offset(int row, int chunk) {
  static_assert(kChunks % 8 == 0);
  return (row * kChunks + (chunk ^ (row & 7))) * 16;
}

VD_DEV float quad_sum(float x) {
  x += arch::shfl_xor_f(x, 1);
  return x + arch::shfl_xor_f(x, 2);
}

// Softmax of both signs over the columns that a warp holds of its 16 rows: kTiles tiles of 8, from column `first` on;
// columns from `dim` on weigh 0.
template <int kTiles>
struct SignedSoftmax {
  float top[2], low[2];     // of rows lane / 4 and lane / 4 + 8, in base 2
  float plus[2], minus[2];  // sums, relative to them
  float (&p)[kTiles][4];    // scores, then exponentials
  float m[kTiles][4];       // exponentials of the negative scores

  VD_METHOD explicit SignedSoftmax(float (&scores)[kTiles][4]) : p(scores) {}

  VD_METHOD void run(int first, int dim) {
    const int column = first + 2 * (threadIdx.x % 4);
    VD_UNROLL for (int r = 0; r < 2; ++r) {
      float most = -INFINITY, least = INFINITY;
      VD_UNROLL for (int n = 0; n < kTiles; ++n) {
        VD_UNROLL for (int c = 2 * r; c < 2 * r + 2; ++c) {
          p[n][c] *= kLog2e;
          const bool exists = column + 8 * n + c % 2 < dim;
          most = fmaxf(most, exists ? p[n][c] : -INFINITY);
          least = fminf(least, exists ? p[n][c] : INFINITY);
        }
      }
      VD_UNROLL for (int step = 1; step < 4; step *= 2) {
        most = fmaxf(most, arch::shfl_xor_f(most, step));
        least = fminf(least, arch::shfl_xor_f(least, step));
      }
      top[r] = most;
      low[r] = least;
      float sum_p = 0.f, sum_m = 0.f;
      VD_UNROLL for (int n = 0; n < kTiles; ++n) {
        VD_UNROLL for (int c = 2 * r; c < 2 * r + 2; ++c) {
          const bool exists = column + 8 * n + c % 2 < dim;
          m[n][c] = exists ? arch::ex2(least - p[n][c]) : 0.f;
          p[n][c] = exists ? arch::ex2(p[n][c] - most) : 0.f;
          sum_p += p[n][c];
          sum_m += m[n][c];
        }
      }
      plus[r] = quad_sum(sum_p);
      minus[r] = quad_sum(sum_m);
    }
  }
};

// How many parts of `units` each of `sequences` sequences is cut into so that `slots` blocks at a time finish first; a
// part costs `fixed` units besides its own.
inline int32_t parts_for(int64_t sequences, int64_t units, int64_t slots, int64_t fixed, int64_t most) {
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t parts = 1; parts <= most && parts <= units; ++parts) {
    const int64_t waves = (sequences * parts + slots - 1) / slots;
    const int64_t cost = waves * ((units + parts - 1) / parts + fixed);
    if (cost < best_cost) best = parts, best_cost = cost;
  }
  return int32_t(best);
}

inline bool rows_aligned(const TokenRows& x, int64_t batch, int64_t length, int64_t heads) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (batch <= 1 || x.batch_stride % 8 == 0) &&
         (length <= 1 || x.row_stride % 8 == 0) && (heads <= 1 || x.head_stride % 8 == 0);
}

constexpr int kMatrixDim = 128;  // most columns on tensor cores

inline bool matrix_dims(DType dtype, int dim, int dim_v) {
  return dtype != DType::f32 && dim <= kMatrixDim && dim_v <= kMatrixDim && dim % 8 == 0 && dim_v % 8 == 0;
}

}  // namespace vdit::gpu::linear

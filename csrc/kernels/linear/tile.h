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

// Rows `row` ... row + 15 of a tile, a multiple of 16, as two right operands of 16 rows by 8 columns: chunks 2n and 2n
// + 1. The lane's part of the address does not depend on the row, so that steps differ by a constant.
template <int kChunks>
VD_DEV void load_right(uint32_t tile, int row, int n, uint32_t (&b)[4]) {
  const int lane = threadIdx.x % 32;
  arch::ldsm4t(tile + chunk_offset<kChunks>(lane % 16, 2 * n + lane / 16) + row * kChunks * 16, b);
}

VD_DEV float quad_sum(float x) {
  x += arch::shfl_xor_f(x, 1);
  return x + arch::shfl_xor_f(x, 2);
}

// A warp's scores of 16 rows, accumulators of kTiles tiles of 8 columns from column `first` on: for softmaxes of both
// signs over the columns below `dim`.
template <int kTiles>
struct SignedScores {
  float (&y)[kTiles][4];  // in base 2 after bounds()
  int first, dim;
  float top[2], low[2];  // of rows lane / 4 and lane / 4 + 8

  VD_METHOD SignedScores(float (&scores)[kTiles][4], int first_column, int columns)
      : y(scores), first(first_column + 2 * int(threadIdx.x % 4)), dim(columns) {
    VD_UNROLL for (int r = 0; r < 2; ++r) {
      top[r] = -INFINITY;
      low[r] = INFINITY;
    }
    VD_UNROLL for (int n = 0; n < kTiles; ++n) {
      VD_UNROLL for (int c = 0; c < 4; ++c) {
        y[n][c] *= kLog2e;
        top[c / 2] = fmaxf(top[c / 2], exists(n, c) ? y[n][c] : -INFINITY);
        low[c / 2] = fminf(low[c / 2], exists(n, c) ? y[n][c] : INFINITY);
      }
    }
    VD_UNROLL for (int r = 0; r < 2; ++r) {
      VD_UNROLL for (int step = 1; step < 4; step *= 2) {
        top[r] = fmaxf(top[r], arch::shfl_xor_f(top[r], step));
        low[r] = fminf(low[r], arch::shfl_xor_f(low[r], step));
      }
    }
    // Which columns exist is found out again: to keep it would take a register for every column.
    uint32_t again[1] = {uint32_t(dim)};
    arch::fence_regs(again);
    dim = int(again[0]);
  }

  VD_METHOD bool exists(int n, int c) const { return first + 8 * n + c % 2 < dim; }
  VD_METHOD float plus(int n, int c) const { return exists(n, c) ? arch::ex2(y[n][c] - top[c / 2]) : 0.f; }
  VD_METHOD float minus(int n, int c) const { return exists(n, c) ? arch::ex2(low[c / 2] - y[n][c]) : 0.f; }
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

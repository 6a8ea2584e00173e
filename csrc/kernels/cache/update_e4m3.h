// factor_update with factors in e4m3: a row per group of neighbouring threads, up to a CTA, the row in registers.
//
//   issue output, minus, old codes, scales  ->  largest magnitudes of all new factors, one exchange in the group
//   ->  the factors once more, encoded  ->  codes, scales
//
// Thread t of the group holds pieces t, t + threads, ... of 8 neighbouring elements: the offset in fp32, old factors as
// codes. The differences are computed twice, because the numbers of all factors would not fit in registers.
#pragma once
#include "kernels/cache/cache_kernel.h"

namespace vdit::gpu::cache {

constexpr int kMaxRowThreads = 512, kMaxRowWarps = kMaxRowThreads / 32, kTops = kMaxFactors * kMaxRowWarps;

struct RowArgs {
  FactorUpdateParams p;
  uint32_t rows;
  int32_t threads;  // of a row: a power of two up to 32, or all of the CTA
  int32_t pieces;   // of a row, the last one may be cut
  int32_t aligned;  // every row of every tensor is made of whole pieces
};

// f(i, F_i new), i = 0 ... last; v: output - minus, which is changed.
template <int kFactors, class F>
VD_DEV void each_factor(const FactorUpdateParams& p, float (&v)[kPiece], const uint2 (&old)[kFactors - 1],
                        const uint32_t (&scale)[kFactors - 1], F f) {
  VD_UNROLL for (int i = 0; i < kFactors; ++i) {
    if (i > p.last) continue;
    f(i, v);
    if (i == p.last || i == kFactors - 1) continue;
    float t[kPiece];
    e4m3::decode(old[i], arch::as_float(scale[i]), t);
    VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] = (v[e] - t[e]) / p.distance;
  }
}

// The largest of `top` in the group, for every factor. Whole warps come here.
template <int kFactors>
VD_DEV void group_largest(const RowArgs& a, uint32_t* tops, uint32_t (&top)[kFactors]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, lanes = a.threads < 32 ? a.threads : 32;
  VD_UNROLL for (int i = 0; i < kFactors; ++i) {
    if (i > a.p.last) continue;
    for (int step = 1; step < lanes; step *= 2) {
      const uint32_t other = arch::shfl_xor(top[i], step);
      top[i] = other > top[i] ? other : top[i];
    }
  }
  if (a.threads <= 32) return;
  VD_UNROLL for (int i = 0; i < kFactors; ++i) {
    if (i <= a.p.last && lane == 0) tops[i * kMaxRowWarps + warp] = top[i];
  }
  arch::syncthreads();
  VD_UNROLL for (int i = 0; i < kFactors; ++i) {
    if (i > a.p.last) continue;
    for (int w = 0; w < int(blockDim.x) / 32; ++w) {
      const uint32_t other = tops[i * kMaxRowWarps + w];
      top[i] = other > top[i] ? other : top[i];
    }
  }
}

// The numbers of a row of the scale 2^120 within what has a code there.
VD_DEV void keep_in_range(float (&v)[kPiece]) {
  VD_UNROLL for (int e = 0; e < kPiece; ++e) {
    const uint32_t bits = arch::as_uint(v[e]), magnitude = bits & 0x7fffffff;
    if (magnitude > kTopBits && magnitude < 0x7f800000) v[e] = arch::as_float((bits & 0x80000000) | kTopBits);
  }
}

VD_DEV void unpack_any(const Raw& r, DType dtype, float (&v)[kPiece]) {
  if (dtype == DType::f16)
    unpack<arch::F16>(r, false, v);
  else
    unpack<arch::BF16>(r, dtype == DType::f32, v);
}

// kFactors: the most that are written.
template <int kPieces, int kFactors>
VD_KERNEL(kPieces <= 2 ? kThreads : kMaxRowThreads, 1)
factor_update_e4m3(const VD_GRID_CONST RowArgs a) {
  VD_SHARED(uint32_t, tops, kTops);
  const FactorUpdateParams& p = a.p;
  const bool wide = p.output.dtype == DType::f32;
  const int own = int(threadIdx.x) % a.threads;
  const uint32_t row = blockIdx.x * (blockDim.x / a.threads) + threadIdx.x / a.threads;
  const int pieces = row < a.rows ? a.pieces : 0;
  const int64_t b = row / uint32_t(p.tokens), n = row - b * p.tokens;
  auto* const codes = static_cast<uint8_t*>(p.factors) + int64_t(row) * p.dim;
  const void* const output = element(p.output.data, b * p.output.batch_stride + n * p.output.token_stride, wide);
  const void* const minus = element(p.minus.data, b * p.minus.batch_stride + n * p.minus.token_stride, wide);

  uint32_t old_scale[kFactors - 1] = {};
  VD_UNROLL for (int i = 0; i < kFactors - 1; ++i) {
    if (i < p.last && pieces > 0) old_scale[i] = arch::ldg32(p.scales + i * p.scale_stride + row);
  }
  float kept[kPieces][kPiece];
  uint2 old[kPieces][kFactors - 1];
  VD_UNROLL for (int k = 0; k < kPieces; ++k) {
    const int piece = own + k * a.threads;
    const bool whole = a.aligned != 0 && piece * kPiece + kPiece <= p.dim;
    VD_UNROLL for (int e = 0; e < kPiece; ++e) kept[k][e] = 0.f;
    VD_UNROLL for (int i = 0; i < kFactors - 1; ++i) old[k][i] = uint2{0, 0};
    if (piece >= pieces) continue;
    const Raw now = load<Load::stream>(output, wide, piece, p.dim, whole);
    const Raw before = p.minus.data != nullptr ? load<Load::stream>(minus, wide, piece, p.dim, whole) : Raw{};
    VD_UNROLL for (int i = 0; i < kFactors - 1; ++i) {
      if (i >= p.last) continue;
      old[k][i] = e4m3::load<Load::stream_written>(codes + i * p.factor_stride, piece, p.dim, whole);
    }
    unpack_any(now, p.output.dtype, kept[k]);
    if (p.minus.data == nullptr) continue;
    float t[kPiece];
    unpack_any(before, p.output.dtype, t);
    VD_UNROLL for (int e = 0; e < kPiece; ++e) kept[k][e] -= t[e];
  }

  uint32_t top[kFactors] = {};
  VD_UNROLL for (int k = 0; k < kPieces; ++k) {
    float v[kPiece];
    VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] = kept[k][e];
    each_factor<kFactors>(p, v, old[k], old_scale,
                          [&](int i, const float (&factor)[kPiece]) { top[i] = e4m3::largest(factor, top[i]); });
  }
  group_largest<kFactors>(a, tops, top);
  int32_t exponent[kFactors];
  VD_UNROLL for (int i = 0; i < kFactors; ++i) {
    exponent[i] = e4m3::scale_exponent(top[i]);
    if (i > p.last || own != 0 || pieces == 0) continue;
    arch::stg32(p.scales + i * p.scale_stride + row, arch::as_uint(e4m3::scale(exponent[i])));
  }
  VD_UNROLL for (int k = 0; k < kPieces; ++k) {
    const int piece = own + k * a.threads;
    const bool whole = a.aligned != 0 && piece * kPiece + kPiece <= p.dim;
    if (piece >= pieces) continue;
    each_factor<kFactors>(p, kept[k], old[k], old_scale, [&](int i, const float (&factor)[kPiece]) {
      float v[kPiece];
      VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] = factor[e];
      if (exponent[i] == kTopExponent) keep_in_range(v);
      const uint2 new_codes = e4m3::encode(v, e4m3::inverse(exponent[i]));
      e4m3::store(codes + i * p.factor_stride, piece, p.dim, whole, new_codes);
    });
  }
}

}  // namespace vdit::gpu::cache

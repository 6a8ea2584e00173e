// The feature cache's kernels on GPUs: a thread takes a piece of 8 neighbouring elements, all operands in registers.
//
//   factor_update       issue output, minus, old factors  ->  store factor, difference, store factor, ...
//   forecast_gate_add   issue x  ->  per module: issue its factors and gate  ->  sum  ->  out
//
// Whatever is streamed may be written by the same thread afterwards (factors; out may be x), never by another one.
#pragma once
#include "kernels/cache/cache.h"
#include "kernels/fused/e4m3.h"
#include "kernels/fused/pieces.h"

namespace vdit::gpu::cache {

using namespace pieces;

constexpr int kThreads = 256;

template <class Params>
struct Args {
  Params p;
  uint32_t pieces;  // per row, the last one may be cut
  uint32_t items;   // pieces of all rows
  int32_t aligned;  // every row of every tensor is made of whole 16-byte pieces
};

// Where a piece lies.
struct Place {
  int64_t b, n;
  int64_t row;  // b * N + n
  int piece, end;
  bool aligned;

  template <class Params>
  VD_METHOD Place(const Args<Params>& a, uint32_t item) {
    const uint32_t at = item / a.pieces;
    piece = int(item - at * a.pieces);
    row = at;
    b = a.p.batch == 1 ? 0 : at / uint32_t(a.p.tokens);
    n = row - b * a.p.tokens;
    const int64_t left = a.p.total - row * a.p.dim;
    end = left < a.p.dim ? int(left) : a.p.dim;
    aligned = a.aligned != 0 && piece * kPiece + kPiece <= end;
  }

  VD_METHOD Raw load_row(const AdaLNRows& t) const {
    const bool wide = t.dtype == DType::f32;
    return load<Load::stream_written>(element(t.data, b * t.batch_stride + n * t.token_stride, wide), wide, piece, end,
                                      aligned);
  }
};

template <class H>
VD_KERNEL(kThreads, 3)
factor_update(const VD_GRID_CONST Args<FactorUpdateParams> a) {
  const FactorUpdateParams& p = a.p;
  const bool wide = p.factor_dtype == DType::f32, wide_output = p.output.dtype == DType::f32;
  const bool difference = p.minus.data != nullptr;
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= a.items) return;
  const Place at(a, item);
  const int64_t row = at.row * p.dim;
  Raw old[kMaxFactors - 1];
  const Raw output = at.load_row(p.output);
  const Raw minus = difference ? at.load_row(p.minus) : Raw{};
  VD_UNROLL for (int i = 0; i < kMaxFactors - 1; ++i) {
    if (i >= p.last) continue;
    const void* from = element(p.factors, i * p.factor_stride + row, wide);
    old[i] = load<Load::stream_written>(from, wide, at.piece, at.end, at.aligned);
  }
  float v[kPiece], t[kPiece];
  unpack<H>(output, wide_output, v);
  if (difference) {
    unpack<H>(minus, wide_output, t);
    VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] -= t[e];
  }
  VD_UNROLL for (int i = 0; i < kMaxFactors; ++i) {
    if (i > p.last) continue;
    void* to = const_cast<void*>(element(p.factors, i * p.factor_stride + row, wide));
    store<H>(to, wide, at.piece, at.end, at.aligned, v);
    if (i == p.last || i == kMaxFactors - 1) continue;
    unpack<H>(old[i], wide, t);
    VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] = (v[e] - t[e]) / p.distance;
  }
}

// A piece of factor i of a module in flight: fp32 or 16-bit numbers, or codes and the scale of their row, which L1
// holds.
template <bool kE4m3>
struct Stored {
  Raw raw;

  VD_METHOD void load(const ForecastModule& m, int i, const Place& at, int64_t row, bool wide) {
    raw = pieces::load<Load::stream>(element(m.factors, i * m.factor_stride + row, wide), wide, at.piece, at.end,
                                     at.aligned);
  }
  template <class H>
  VD_METHOD void unpack(bool wide, float (&v)[kPiece]) const {
    pieces::unpack<H>(raw, wide, v);
  }
};
template <>
struct Stored<true> {
  uint2 codes;
  uint32_t scale;

  VD_METHOD void load(const ForecastModule& m, int i, const Place& at, int64_t row, bool) {
    const void* from = static_cast<const uint8_t*>(m.factors) + i * m.factor_stride + row;
    codes = e4m3::load<Load::stream>(from, at.piece, at.end, at.aligned);
    scale = arch::ldg32(m.scales + i * m.scale_stride + at.row);
  }
  template <class H>
  VD_METHOD void unpack(bool, float (&v)[kPiece]) const {
    e4m3::decode(codes, arch::as_float(scale), v);
  }
};

// kFactors: the most that are read of a module.
template <class H, int kFactors, bool kE4m3>
VD_KERNEL(kThreads, kFactors <= 2 ? 3 : 2)
forecast_gate_add(const VD_GRID_CONST Args<ForecastParams> a) {
  const ForecastParams& p = a.p;
  const bool wide = p.factor_dtype == DType::f32, wide_out = p.out_dtype == DType::f32;
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= a.items) return;
  const Place at(a, item);
  const Raw x = p.x.data != nullptr ? at.load_row(p.x) : Raw{};
  float total[kPiece], v[kPiece], t[kPiece];
  for (int j = 0; j < p.modules; ++j) {
    const ForecastModule& module = p.module[j];
    Stored<kE4m3> factor[kFactors];
    VD_UNROLL for (int i = 0; i < kFactors; ++i) {
      if (i >= p.factors) continue;
      factor[i].load(module, i, at, at.row * p.dim, wide);
    }
    const void* gate = row_of(p, module.gate, at.b, at.n);
    if (gate != nullptr) table_piece<H>(p, module.gate, gate, at.piece, at.end, at.aligned, t);
    if (j == 0) unpack<H>(x, wide_out, total);
    factor[0].template unpack<H>(wide, v);
    VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] *= p.weight[0];
    VD_UNROLL for (int i = 1; i < kFactors; ++i) {
      if (i >= p.factors) continue;
      float f[kPiece];
      factor[i].template unpack<H>(wide, f);
      VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] += p.weight[i] * f[e];
    }
    round_to<H>(v, p.round);
    if (gate != nullptr) {
      VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] *= t[e];
      round_to<H>(v, p.round && module.gate.round);
    }
    VD_UNROLL for (int e = 0; e < kPiece; ++e) total[e] += v[e];
    round_to<H>(total, p.round);
  }
  void* out = const_cast<void*>(element(p.out, at.b * p.out_batch_stride + at.n * p.out_token_stride, wide_out));
  store<H>(out, wide_out, at.piece, at.end, at.aligned, total);
}

}  // namespace vdit::gpu::cache

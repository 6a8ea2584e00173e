// The adaptive norms on GPUs: a CTA per row, the row in registers, mean and variance as exact passes over them.
//
// Thread t holds pieces t, t + threads, ... of 8 neighbouring elements. A CTA takes `rows_per_cta` neighbouring rows,
// which mostly have the same rows of the tables.
//
//   adaln_modulate:        issue x  ->  issue scale, shift where they change  ->  0-2 sums  ->  h
//   with a residual:       issue x, y, gate  ->  post(y): 0-2 sums  ->  x_new  ->  issue scale, shift  ->  0-2 sums  ->
//   h
#pragma once
#include "kernels/fused/adaln.h"
#include "kernels/fused/pieces.h"

namespace vdit::gpu::adaln {

using namespace pieces;

constexpr int kMaxWarps = 16;

struct Args {
  AdaLNParams p;
  int32_t rows_per_cta;
  int32_t pieces;   // per row, the last one may be cut
  int32_t aligned;  // every row of every tensor is made of whole 16-byte pieces
};

// Sum over the block. Two rows of `totals` take turns: who writes one has passed a barrier since it was read.
VD_DEV float block_sum(float v, float* totals, int& turn) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  VD_UNROLL for (int step = 16; step > 0; step /= 2) v += arch::shfl_xor_f(v, step);
  if (warps == 1) return v;
  float* slot = totals + turn * kMaxWarps;
  turn ^= 1;
  if (lane == 0) slot[warp] = v;
  arch::syncthreads();
  v = 0.f;
  for (int i = 0; i < warps; ++i) v += slot[i];
  return v;
}

// A row in registers: kPieces pieces of the thread. Elements beyond the row are 0 and count for nothing.
template <class H, int kPieces>
struct Row {
  const Args& a;
  float* totals;
  int turn = 0;

  VD_METHOD explicit Row(const Args& args, float* shared) : a(args), totals(shared) {}

  VD_METHOD int piece(int k) const { return int(threadIdx.x) + k * int(blockDim.x); }
  VD_METHOD bool has(int k) const { return piece(k) < a.pieces; }

  VD_METHOD void raw(const void* row, bool wide, Raw (&r)[kPieces]) const {
    VD_UNROLL for (int k = 0; k < kPieces; ++k) {
      r[k] = has(k) ? load<Load::stream>(row, wide, piece(k), a.p.dim, a.aligned) : Raw{};
    }
  }

  // v = (v - mean) / deviation, or v / root mean square
  VD_METHOD void normalise(const AdaLNNorm& norm, float (&v)[kPieces][kPiece]) {
    if (norm.kind == NormKind::none) return;
    const auto dim = float(a.p.dim);
    float mean = 0.f, sum = 0.f;
    if (norm.kind == NormKind::layer) {
      VD_UNROLL for (int k = 0; k < kPieces; ++k) VD_UNROLL for (int e = 0; e < kPiece; ++e) sum += v[k][e];
      mean = block_sum(sum, totals, turn) / dim;
      sum = 0.f;
    }
    VD_UNROLL for (int k = 0; k < kPieces; ++k) {
      VD_UNROLL for (int e = 0; e < kPiece; ++e) {
        const float d = piece(k) * kPiece + e < a.p.dim ? v[k][e] - mean : 0.f;
        sum += d * d;
        v[k][e] = d;
      }
    }
    const float scale = 1.f / sqrtf(block_sum(sum, totals, turn) / dim + norm.eps);
    VD_UNROLL for (int k = 0; k < kPieces; ++k) VD_UNROLL for (int e = 0; e < kPiece; ++e) v[k][e] *= scale;
  }

  // v = v * weight + bias
  VD_METHOD void affine(const AdaLNNorm& norm, int k, float (&v)[kPiece]) const {
    const bool wide = norm.dtype == DType::f32;
    float t[kPiece];
    round_to<H>(v, norm.round);
    if (norm.weight != nullptr) {
      load_floats<H>(norm.weight, wide, piece(k), a.p.dim, a.aligned, t);
      VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] *= t[e];
    }
    if (norm.bias != nullptr) {
      load_floats<H>(norm.bias, wide, piece(k), a.p.dim, a.aligned, t);
      VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] += t[e];
    }
  }

  // As table_piece, which called from here makes the kernel for two pieces spill.
  VD_METHOD void table(const AdaLNTable& t, const void* row, int k, float (&v)[kPiece]) const {
    load_floats<H>(row, a.p.row_dtype == DType::f32, piece(k), a.p.dim, a.aligned, v);
    if (t.base == nullptr) return;
    float base[kPiece];
    load_floats<H>(t.base, a.p.base_dtype == DType::f32, piece(k), a.p.dim, a.aligned, base);
    VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] += base[e];
    round_to<H>(v, t.round);
  }

  VD_METHOD void gate(const void* row, int k, float (&v)[kPiece]) const {
    VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] = 1.f;
    if (row == nullptr || !has(k)) return;
    table(a.p.gate, row, k, v);
    if (a.p.tanh_gate == 0) return;
    VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] = tanhf(v[e]);
    round_to<H>(v, a.p.gate.round);
  }

  // 1 + scale, and shift
  VD_METHOD void modulation(const void* scale, const void* shift, int k, float (&s)[kPiece], float (&t)[kPiece]) const {
    VD_UNROLL for (int e = 0; e < kPiece; ++e) s[e] = 1.f, t[e] = 0.f;
    if (!has(k)) return;
    if (scale != nullptr) {
      table(a.p.scale, scale, k, s);
      VD_UNROLL for (int e = 0; e < kPiece; ++e) s[e] += 1.f;
      round_to<H>(s, a.p.scale.round);
    }
    if (shift != nullptr) table(a.p.shift, shift, k, t);
  }
};

// kResidual: there is a y. Rows of the tables are in registers before the sums are taken that they wait for; without a
// y they stay there for the next tokens, with one the registers would cost a resident CTA, and L1 has them. With four
// pieces per thread they are loaded where they are used.
template <class H, int kPieces, int kThreads, int kBlocks, bool kResidual>
VD_KERNEL(kThreads, kBlocks)
adaln_rows(const VD_GRID_CONST Args a) {
  VD_SHARED(float, totals, 2 * kMaxWarps);
  constexpr bool kEarly = kPieces <= 2;
  constexpr int kKept = kEarly ? kPieces : 1;
  const AdaLNParams& p = a.p;
  Row<H, kPieces> row(a, totals);
  const bool wide_x = p.x.dtype == DType::f32, wide_y = p.y.dtype == DType::f32;
  const int64_t all = p.batch * p.tokens, first = int64_t(blockIdx.x) * a.rows_per_cta;
  const int64_t last = first + a.rows_per_cta < all ? first + a.rows_per_cta : all;
  const void *scale_row = nullptr, *shift_row = nullptr;
  float scale[kKept][kPiece], shift[kKept][kPiece];
  for (int64_t at = first; at < last; ++at) {
    const int64_t b = at / p.tokens, n = at - b * p.tokens;
    Raw raw[kPieces];
    float v[kPieces][kPiece];
    row.raw(element(p.x.data, b * p.x.batch_stride + n * p.x.token_stride, wide_x), wide_x, raw);
    const void *new_scale = row_of(p, p.scale, b, n), *new_shift = row_of(p, p.shift, b, n);
    const bool fresh = kResidual || at == first || new_scale != scale_row || new_shift != shift_row;
    scale_row = new_scale, shift_row = new_shift;

    if constexpr (kResidual) {
      Raw raw_y[kPieces];
      float y[kPieces][kPiece], gate[kKept][kPiece];
      row.raw(element(p.y.data, b * p.y.batch_stride + n * p.y.token_stride, wide_y), wide_y, raw_y);
      const void* gate_row = row_of(p, p.gate, b, n);
      if constexpr (kEarly) {
        VD_UNROLL for (int k = 0; k < kPieces; ++k) row.gate(gate_row, k, gate[k]);
      }
      VD_UNROLL for (int k = 0; k < kPieces; ++k) unpack<H>(raw_y[k], wide_y, y[k]);
      row.normalise(p.post, y);
      VD_UNROLL for (int k = 0; k < kPieces; ++k) {
        unpack<H>(raw[k], wide_x, v[k]);
        if (!row.has(k)) continue;
        row.affine(p.post, k, y[k]);
        round_to<H>(y[k], p.round_post);
        float (&g)[kPiece] = gate[kEarly ? k : 0];
        if constexpr (!kEarly) row.gate(gate_row, k, g);
        VD_UNROLL for (int e = 0; e < kPiece; ++e) y[k][e] *= g[e];
        round_to<H>(y[k], p.round_gated);
        VD_UNROLL for (int e = 0; e < kPiece; ++e) v[k][e] += y[k][e];
        void* out = const_cast<void*>(element(p.x_new, at * p.dim, wide_x));
        store<H>(out, wide_x, row.piece(k), p.dim, a.aligned, v[k]);
        round_to<H>(v[k], p.round_new);
      }
      if (p.h == nullptr) continue;
    }
    if (kEarly && fresh) {
      VD_UNROLL for (int k = 0; k < kKept; ++k) row.modulation(scale_row, shift_row, k, scale[k], shift[k]);
    }
    if constexpr (!kResidual) {
      VD_UNROLL for (int k = 0; k < kPieces; ++k) unpack<H>(raw[k], wide_x, v[k]);
    }
    row.normalise(p.norm, v);
    VD_UNROLL for (int k = 0; k < kPieces; ++k) {
      if (!row.has(k)) continue;
      row.affine(p.norm, k, v[k]);
      round_to<H>(v[k], p.round_chain || p.norm.round);
      float (&s)[kPiece] = scale[kEarly ? k : 0];
      float (&t)[kPiece] = shift[kEarly ? k : 0];
      if constexpr (!kEarly) row.modulation(scale_row, shift_row, k, s, t);
      VD_UNROLL for (int e = 0; e < kPiece; ++e) v[k][e] *= s[e];
      round_to<H>(v[k], p.round_chain);
      VD_UNROLL for (int e = 0; e < kPiece; ++e) v[k][e] += t[e];
      void* out = const_cast<void*>(element(p.h, at * p.dim, wide_x));
      store<H>(out, wide_x, row.piece(k), p.dim, a.aligned, v[k]);
    }
  }
}

}  // namespace vdit::gpu::adaln

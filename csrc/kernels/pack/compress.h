// Slices compressed to bf16 or e4m3. A thread has 8 neighbouring channels; the block / 8 threads of a block of e4m3 are
// neighbours in a warp and find its power of two by shuffles. All warps of a CTA go through the same rounds, so that
// shuffles have all lanes.
#pragma once
#include "arch/arch.h"
#include "kernels/fused/e4m3.h"
#include "kernels/fused/pieces.h"
#include "kernels/pack/move.h"

namespace vdit::gpu::pack {

constexpr int kRounds = 4;

// What a thread does in a round.
struct Part {
  bool any;         // whether it has channels
  bool whole;       // whether they are 8, at multiples of 16 bytes
  uint32_t vector;  // the head they belong to, of the slice
  uint32_t group;   // the block, of the slice
  int32_t piece;    // the first channel / 8
};

struct Blocks {
  int32_t lanes;  // threads of a block
  uint32_t per_vector, groups;

  VD_METHOD Blocks(const PackParams& p, const PackTensor& t, const PackSlice& s)
      : lanes(p.format == PackFormat::e4m3 ? p.block / pieces::kPiece : 1),
        per_vector((t.dim + lanes * pieces::kPiece - 1) / (lanes * pieces::kPiece)),
        groups(uint32_t(p.batch) * s.rows * s.heads * per_vector) {}

  VD_METHOD uint32_t first(int round) const { return (blockIdx.x * kRounds + round) * (kThreads / lanes); }
  VD_METHOD Part part(const PackTensor& t, int round, bool aligned) const {
    Part at{};
    at.group = first(round) + threadIdx.x / lanes;
    at.vector = at.group / per_vector;
    at.piece = int32_t(at.group % per_vector) * lanes + int32_t(threadIdx.x % lanes);
    at.any = at.group < groups && at.piece * pieces::kPiece < t.dim;
    at.whole = aligned && at.any;
    return at;
  }
};

template <class H>
VD_DEV void encode_e4m3(const PackParams& p, const PackTensor& t, const PackSlice& s, const Blocks& blocks,
                        const Part& at, float (&v)[pieces::kPiece]) {
  uint32_t top = e4m3::largest(v, 0);
  for (int lane = 1; lane < blocks.lanes; lane *= 2) {
    const uint32_t other = arch::shfl_xor(top, lane);
    top = other > top ? other : top;
  }
  if (!at.any) return;
  const int32_t exponent = e4m3::scale_exponent(top);
  const uint2 codes = e4m3::encode(v, e4m3::inverse(exponent));
  e4m3::store(s.packed + int64_t(at.vector) * t.dim, at.piece, t.dim, at.whole, codes);
  if (threadIdx.x % blocks.lanes == 0) {
    const int64_t all = int64_t(p.batch) * s.rows * s.heads * t.dim;
    s.packed[pack_aligned(all) + at.group] = char(exponent);
  }
}

VD_DEV void clear_ends(const PackParams& p, const PackTensor& t, const PackSlice& s, const Blocks& blocks) {
  const int64_t codes = int64_t(p.batch) * s.rows * s.heads * t.dim, scales = blocks.groups;
  const int64_t at = threadIdx.x;
  if (codes + at < pack_aligned(codes)) s.packed[codes + at] = 0;
  if (scales + at < pack_aligned(scales)) s.packed[pack_aligned(codes) + scales + at] = 0;
}

// H: the 16-bit type of the tensors; anything if they are fp32.
template <class H, bool kE4m3>
VD_KERNEL(kThreads, 1)
compress_slices(const VD_GRID_CONST PackParams p, int32_t aligned) {
  const int32_t tensor = blockIdx.y % p.tensors;
  const PackTensor& t = p.tensor[tensor];
  const PackSlice s = pack_slice(p, tensor, blockIdx.y / p.tensors);
  const Blocks blocks(p, t, s);
  if (kE4m3 && blockIdx.x == 0) clear_ends(p, t, s, blocks);
  const bool wide = p.dtype == DType::f32;
  for (int round = 0; round < kRounds && blocks.first(round) < blocks.groups; ++round) {
    const Part at = blocks.part(t, round, aligned != 0);
    float v[pieces::kPiece] = {};
    if (at.any) {
      const char* row = head_of(t, s, at.vector);
      pieces::unpack<H>(pieces::load<pieces::Load::stream>(row, wide, at.piece, t.dim, at.whole), wide, v);
    }
    if constexpr (kE4m3) {
      encode_e4m3<H>(p, t, s, blocks, at, v);
    } else if (at.any) {
      char* const to = s.packed + int64_t(at.vector) * t.dim * 2;
      pieces::store<arch::BF16>(to, false, at.piece, t.dim, at.whole, v);
    }
  }
}

template <class H, bool kE4m3>
VD_KERNEL(kThreads, 1)
expand_slices(const VD_GRID_CONST PackParams p, int32_t aligned) {
  const int32_t tensor = blockIdx.y % p.tensors;
  const PackTensor& t = p.tensor[tensor];
  const PackSlice s = pack_slice(p, tensor, blockIdx.y / p.tensors);
  const Blocks blocks(p, t, s);
  const bool wide = p.dtype == DType::f32;
  const float limit = wide ? 3.40282347e38f : p.dtype == DType::bf16 ? arch::as_float(0x7f7f0000) : 65504.f;
  for (int round = 0; round < kRounds && blocks.first(round) < blocks.groups; ++round) {
    const Part at = blocks.part(t, round, aligned != 0);
    if (!at.any) continue;
    float v[pieces::kPiece];
    if constexpr (kE4m3) {
      const char* const from = s.packed + int64_t(at.vector) * t.dim;
      const uint2 codes = e4m3::load<e4m3::Load::stream>(from, at.piece, t.dim, at.whole);
      const int64_t all = int64_t(p.batch) * s.rows * s.heads * t.dim;
      e4m3::decode(codes, e4m3::scale(uint8_t(s.packed[pack_aligned(all) + at.group])), v);
      VD_UNROLL for (int e = 0; e < pieces::kPiece; ++e) {
        v[e] = v[e] > limit ? limit : v[e] < -limit ? -limit : v[e];  // NaN stays NaN
      }
    } else {
      const char* const from = s.packed + int64_t(at.vector) * t.dim * 2;
      const pieces::Raw raw = pieces::load<pieces::Load::stream>(from, false, at.piece, t.dim, at.whole);
      pieces::unpack<arch::BF16>(raw, false, v);
    }
    pieces::store<H>(head_of(t, s, at.vector), wide, at.piece, t.dim, at.whole, v);
  }
}

}  // namespace vdit::gpu::pack

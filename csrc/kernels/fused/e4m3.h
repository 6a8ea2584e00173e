// Numbers in e4m3 under a power of two that neighbours share: 8 codes per thread, in two words. Values are code *
// scale.
#pragma once
#include "arch/arch.h"
#include "kernels/fused/pieces.h"

namespace vdit::gpu::e4m3 {

using pieces::kPiece, pieces::Load;

// The bits of the largest finite magnitude among the numbers and `top`.
VD_DEV uint32_t largest(const float (&v)[kPiece], uint32_t top) {
  VD_UNROLL for (int e = 0; e < kPiece; ++e) {
    const uint32_t magnitude = arch::as_uint(v[e]) & 0x7fffffff;
    if (magnitude < 0x7f800000 && magnitude > top) top = magnitude;
  }
  return top;
}

// The biased exponent of the smallest power of two, at least 2^-126, with which a magnitude is at most 448 = 1.75 *
// 2^8.
VD_DEV int32_t scale_exponent(uint32_t magnitude) {
  const int32_t e = int32_t(magnitude >> 23) - 8 + ((magnitude & 0x7fffff) > 0x600000 ? 1 : 0);
  return e < 1 ? 1 : e;
}
VD_DEV float scale(int32_t exponent) { return arch::as_float(uint32_t(exponent) << 23); }
VD_DEV float inverse(int32_t exponent) { return arch::as_float(uint32_t(254 - exponent) << 23); }

// Whatever is not finite becomes NaN: e4m3 has no infinity.
VD_DEV uint2 encode(const float (&v)[kPiece], float inverse) {
  uint32_t word[2] = {};
  float scaled[kPiece];
  VD_UNROLL for (int e = 0; e < kPiece; ++e) {
    const bool finite = (arch::as_uint(v[e]) & 0x7fffffff) < 0x7f800000;
    scaled[e] = finite ? v[e] * inverse : arch::as_float(0x7fffffff);
  }
  VD_UNROLL for (int e = 0; e < kPiece; e += 2) {
    word[e / 4] |= arch::pack_e4m3(scaled[e], scaled[e + 1]) << (e % 4 * 8);
  }
  return {word[0], word[1]};
}

VD_DEV void decode(uint2 codes, float scale, float (&v)[kPiece]) {
  const uint32_t word[2] = {codes.x, codes.y};
  VD_UNROLL for (int e = 0; e < kPiece; e += 2) {
    arch::unpack_e4m3(word[e / 4] >> (e % 4 * 8), v[e], v[e + 1]);
    v[e] *= scale;
    v[e + 1] *= scale;
  }
}

// Piece `piece` of a row of codes that ends at `dim`; `whole`: it is, and begins at a multiple of 8 bytes.
template <Load kLoad>
VD_DEV uint2 load(const void* row, int piece, int dim, bool whole) {
  const int first = piece * kPiece;
  const auto* from = static_cast<const uint8_t*>(row) + first;
  if (whole) return kLoad == Load::stream ? arch::ldg64_stream(from) : arch::ldg64_stream_written(from);
  uint32_t word[2] = {};
  VD_UNROLL for (int e = 0; e < kPiece; ++e) {
    if (first + e < dim) word[e / 4] |= uint32_t(from[e]) << (e % 4 * 8);
  }
  return {word[0], word[1]};
}

VD_DEV void store(void* row, int piece, int dim, bool whole, uint2 codes) {
  const int first = piece * kPiece;
  auto* to = static_cast<uint8_t*>(row) + first;
  if (whole) return arch::stg64(to, codes);
  const uint32_t word[2] = {codes.x, codes.y};
  VD_UNROLL for (int e = 0; e < kPiece; ++e) {
    if (first + e < dim) to[e] = uint8_t(word[e / 4] >> (e % 4 * 8));
  }
}

// On the host: whether rows of codes are made of whole pieces.
inline bool aligned(const void* codes, int64_t stride) {
  return reinterpret_cast<uintptr_t>(codes) % kPiece == 0 && stride % kPiece == 0;
}

}  // namespace vdit::gpu::e4m3

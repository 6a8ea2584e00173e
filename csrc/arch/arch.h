// The hardware primitives, one thin wrapper each, and the only header a kernel includes besides its own parameters.
// nvcc sees one PTX instruction per wrapper (arch_ptx.h); a host compiler sees bodies that drive the emulator
// (arch_emu.h, docs/emulator.md). Signatures are equal, so kernels and their launches are written once, without #ifdef.
//
// Conventions: shared memory addresses and mbarriers are 32-bit addresses in the shared window (smem_u32); register
// fragments are arrays by reference; two 16-bit numbers travel in one uint32_t, the lower index in the lower half.
#pragma once
#include <cstdint>

namespace arch {

// Element types of matrix instructions, as template arguments.
struct BF16;
struct F16;

// Swizzle of 16-byte chunks inside rows of 128, 64 or 32 bytes. The numbers are those of the wgmma descriptor (PTX ISA
// "Shared memory matrix layout", "Matrix descriptor format"). It acts on address bits, so a tile starts at a multiple
// of 8 rows: 1024, 512 or 256 bytes.
enum Swizzle : uint32_t { SW_NONE = 0, SW_128 = 1, SW_64 = 2, SW_32 = 3 };

}  // namespace arch

#ifdef __CUDACC__
#include "arch/arch_ptx.h"
#else
#include "arch/arch_emu.h"
#endif

// Plain arithmetic on top of the primitives: the emulator runs this very code.
namespace arch {

// 64-bit shared memory matrix descriptor of wgmma. `lbo` and `sbo`: leading and stride byte offsets.
VD_DEV uint64_t wgmma_desc(uint32_t smem, uint32_t lbo, uint32_t sbo, Swizzle swizzle) {
  return uint64_t((smem & 0x3ffff) >> 4) | uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32 |
         uint64_t(swizzle) << 62;
}

VD_DEV float shfl_xor_f(float value, int lane_mask) { return as_float(shfl_xor(as_uint(value), lane_mask)); }
VD_DEV float shfl_f(float value, int lane) { return as_float(shfl(as_uint(value), lane)); }

VD_DEV void mbar_arrive_expect_tx(uint32_t bar, uint32_t bytes) { mbar_arrive_tx(bar, bytes); }

// The dtype as a template argument.
template <class T>
struct Half;
template <>
struct Half<BF16> {
  VD_STATIC_METHOD uint32_t pack(float lo, float hi) { return pack_bf16(lo, hi); }
  VD_STATIC_METHOD void unpack(uint32_t pair, float& lo, float& hi) { unpack_bf16(pair, lo, hi); }
  VD_STATIC_METHOD void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_bf16(d, a, b0, b1); }
};
template <>
struct Half<F16> {
  VD_STATIC_METHOD uint32_t pack(float lo, float hi) { return pack_f16(lo, hi); }
  VD_STATIC_METHOD void unpack(uint32_t pair, float& lo, float& hi) { unpack_f16(pair, lo, hi); }
  VD_STATIC_METHOD void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_f16(d, a, b0, b1); }
};

// d += a * b on one warp: m16n8k16, fp32 accumulation.
template <class T>
VD_DEV void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Half<T>::mma(d, a, b0, b1);
}
template <class T>
VD_DEV uint32_t pack(float lo, float hi) {
  return Half<T>::pack(lo, hi);
}
template <class T>
VD_DEV void unpack(uint32_t pair, float& lo, float& hi) {
  Half<T>::unpack(pair, lo, hi);
}

// e4m3: sign, 4 exponent bits of bias 7, 3 mantissa bits; no infinity, NaN is 0x7f. Two codes in the lower half, round
// to nearest even; magnitudes are at most 448. GPUs before compute capability 8.9 have no instruction for it.
VD_DEV uint32_t e4m3_code(float x) {
  const uint32_t sign = as_uint(x) >> 24 & 0x80, magnitude = as_uint(x) & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7f;
  if (magnitude < 0x3c800000) return sign | (as_uint(as_float(magnitude) + 16384.f) - 0x46800000);  // rounds at 2^-9
  return sign | ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - 960;
}
VD_DEV float e4m3_value(uint32_t code) {
  if ((code & 0x7f) == 0x7f) return as_float(0x7fffffff);
  return as_float((code & 0x80) << 24 | as_uint(as_float((code & 0x7f) << 20) * as_float(0x7b800000)));  // 2^120
}
#ifdef VD_HAS_CVT_E4M3
VD_DEV uint32_t pack_e4m3(float lo, float hi) { return cvt_e4m3(lo, hi); }
VD_DEV void unpack_e4m3(uint32_t pair, float& lo, float& hi) { unpack_f16(cvt_e4m3_to_f16(pair), lo, hi); }
#else
VD_DEV uint32_t pack_e4m3(float lo, float hi) { return e4m3_code(lo) | e4m3_code(hi) << 8; }
VD_DEV void unpack_e4m3(uint32_t pair, float& lo, float& hi) {
  lo = e4m3_value(pair);
  hi = e4m3_value(pair >> 8);
}
#endif

// Warpgroup matrix multiply of bf16 operands; the element type is the first template argument otherwise.
template <int TransposeA, int TransposeB, int R>
VD_DEV void wgmma_ss(float (&d)[R], uint64_t desc_a, uint64_t desc_b, int accumulate) {
  wgmma_ss<BF16, TransposeA, TransposeB>(d, desc_a, desc_b, accumulate);
}
template <int TransposeB, int R>
VD_DEV void wgmma_rs(float (&d)[R], const uint32_t* a, uint64_t desc_b, int accumulate) {
  wgmma_rs<BF16, TransposeB>(d, a, desc_b, accumulate);
}

}  // namespace arch

// Vectors of fp32 to and from rows of fp32, fp16 or bf16.
#pragma once
#include "cpu/isa/float16.h"
#include "cpu/isa/vec.h"

namespace VDIT_NS {

typedef uint16_t vu16 __attribute__((vector_size(VL * 2)));
typedef uint32_t vu32 __attribute__((vector_size(VL * 4)));

static inline vf load_row(const float* p) { return load(p); }
static inline void store_row(float* p, vf v) { store(p, v); }

static inline vf load_row(const bf16* p) {
  vu16 bits;
  std::memcpy(&bits, p, sizeof bits);
  return (vf)(__builtin_convertvector(bits, vu32) << 16);
}

// The upper halves of the lanes hold the rounded numbers.
static inline vu32 round_bf16_bits(vf v) {
  const vu32 u = (vu32)v;
  const vu32 rounded = u + 0x7fffu + (u >> 16 & 1u);
  const vu32 quiet = u | 0x400000u;
  return (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}
static inline void store_row(bf16* p, vf v) {
  const vu16 bits = __builtin_convertvector(round_bf16_bits(v) >> 16, vu16);
  std::memcpy(p, &bits, sizeof bits);
}

static inline vf load_row(const f16* p) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif VDIT_VL == 8 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < VL; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}
static inline void store_row(f16* p, vf v) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif VDIT_VL == 8 && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VL; ++i) from_float(v[i], p[i]);
#endif
}

// Rounded to T and back.
template <class T>
static inline vf round_to(vf v);
template <>
inline vf round_to<float>(vf v) {
  return v;
}
template <>
inline vf round_to<bf16>(vf v) {
  return (vf)(round_bf16_bits(v) & 0xffff0000u);
}
template <>
inline vf round_to<f16>(vf v) {
  f16 bits[VL];
  store_row(bits, v);
  return load_row(bits);
}

// Lanes 1, 0, 3, 2, ...
static inline vf swap_neighbours(vf v) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  return (vf)_mm512_permute_ps((__m512)v, 0xb1);
#elif VDIT_VL == 8 && defined(__AVX__)
  return (vf)_mm256_permute_ps((__m256)v, 0xb1);
#else
  vf r;
  for (int i = 0; i < VL; ++i) r[i] = v[i ^ 1];
  return r;
#endif
}

}  // namespace VDIT_NS

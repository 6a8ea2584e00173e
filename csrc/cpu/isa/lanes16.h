// Vectors of VDIT_VL floats from and to memory that holds fp32, fp16 or bf16, and rounding to those types.
#pragma once
#include "cpu/isa/float16.h"
#include "cpu/isa/vec.h"

namespace VDIT_NS {

typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef uint16_t vh_u __attribute__((vector_size(VL * 2), aligned(2), may_alias));

#if VDIT_VL == 16 && defined(__AVX512F__)
constexpr __mmask16 kEvery = 0xffff;  // zero-masked conversions: GCC 12 warns of its own header otherwise
#endif

// The upper half of every lane is its bf16, round to nearest even. A NaN gets its quiet bit: the payload of one that
// has it not may lie wholly in the half that is cut off.
static inline vu bf16_bits(vf v) {
  const vu u = (vu)v, nan = u | 0x00400000u;
  const vu rounded = u + (0x7fffu + ((u >> 16) & 1u));
#if VDIT_VL == 8 && defined(__AVX2__)
  return (vu)_mm256_blendv_ps((__m256)rounded, (__m256)nan, _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
#else
  return v == v ? rounded : nan;
#endif
}

static inline vf load_lanes(const float* p) { return load(p); }
static inline vf load_lanes(const bf16* p) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vf)((vu)_mm512_maskz_cvtepu16_epi32(kEvery, bits) << 16);
#elif VDIT_VL == 8 && defined(__AVX2__)
  // GCC 12 makes four shuffles of __builtin_convertvector here.
  return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) << 16);
#else
  const vh bits = *reinterpret_cast<const vh_u*>(p);
  return (vf)(__builtin_convertvector(bits, vu) << 16);
#endif
}
static inline vf load_lanes(const f16* p) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(kEvery, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif VDIT_VL == 8 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < VL; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

static inline void store_lanes(float* p, vf v) { store(p, v); }
static inline void store_lanes(bf16* p, vf v) {
  const vu bits = bf16_bits(v) >> 16;
#if VDIT_VL == 8 && defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)bits), high = _mm256_extracti128_si256((__m256i)bits, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
#else
  *reinterpret_cast<vh_u*>(p) = __builtin_convertvector(bits, vh);
#endif
}
static inline void store_lanes(f16* p, vf v) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(kEvery, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif VDIT_VL == 8 && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VL; ++i) from_float(v[i], p[i]);
#endif
}

// The bytes of a vector in memory of type T; stream_lanes stores past the caches, at multiples of that. Whoever has
// stored so calls stream_fence before another thread reads it.
template <class T>
constexpr int kLaneBytes = VL * int(sizeof(T));
template <class T>
static inline void stream_lanes(T* p, vf v) {
#if defined(__AVX__)
  T aligned[VL] __attribute__((aligned(kLaneBytes<T>)));
  store_lanes(aligned, v);
  if constexpr (kLaneBytes<T> == 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(aligned));
  else if constexpr (kLaneBytes<T> == 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(aligned));
#if defined(__AVX512F__)
  else
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<const __m512i*>(aligned));
#endif
#else
  store_lanes(p, v);
#endif
}
static inline void stream_fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// The nearest value of type T.
template <class T>
static inline vf round_lanes(vf v);
template <>
inline vf round_lanes<float>(vf v) {
  return v;
}
template <>
inline vf round_lanes<bf16>(vf v) {
  return (vf)(bf16_bits(v) & 0xffff0000u);
}
template <>
inline vf round_lanes<f16>(vf v) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  return (vf)_mm512_maskz_cvtph_ps(kEvery, _mm512_maskz_cvtps_ph(kEvery, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif VDIT_VL == 8 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VL; ++i) {
    f16 h;
    from_float(v[i], h);
    v[i] = to_float(h);
  }
  return v;
#endif
}

// The first n < VL lanes; the others are 0.
template <class T>
static inline vf load_some(const T* p, int n) {
  vf v{};
  for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return v;
}
template <class T>
static inline void store_some(T* p, vf v, int n) {
  for (int i = 0; i < n; ++i) from_float(v[i], p[i]);
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

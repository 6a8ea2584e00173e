// Vectors of numbers from and to e4m3 codes under a power of two that neighbours share: values are code * scale.
#pragma once
#include "cpu/isa/lanes16.h"

namespace VDIT_NS {

struct e4m3 {
  uint8_t bits;
};

typedef uint8_t vb __attribute__((vector_size(VL)));
typedef uint8_t vb_u __attribute__((vector_size(VL), aligned(1), may_alias));

constexpr uint32_t kMagnitude = 0x7fffffff, kInfinite = 0x7f800000;

static inline vu any_of(vu where, vu yes, vu no) { return (yes & where) | (no & ~where); }

static inline void store_codes(uint8_t* p, vu code, int n) {
#if VDIT_VL == 8 && defined(__AVX2__)
  if (n == VL) {
    const __m128i low = _mm256_castsi256_si128((__m256i)code), high = _mm256_extracti128_si256((__m256i)code, 1);
    const __m128i words = _mm_packus_epi32(low, high);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
    return;
  }
#else
  if (n == VL) {
    *reinterpret_cast<vb_u*>(p) = __builtin_convertvector(code, vb);
    return;
  }
#endif
  for (int i = 0; i < n; ++i) p[i] = uint8_t(code[i]);
}

// Codes as signed bytes in their lanes, so that a code's sign is a lane's.
static inline vi load_codes(const uint8_t* p, int n) {
#if VDIT_VL == 8 && defined(__AVX2__)
  if (n == VL) return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#elif VDIT_VL == 16 && defined(__AVX512F__)
  if (n == VL) return (vi)_mm512_maskz_cvtepi8_epi32(kEvery, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  if (n == VL) return (vi)(__builtin_convertvector((vb) * reinterpret_cast<const vb_u*>(p), vu) << 24) >> 24;
#endif
  vi code{};
  for (int i = 0; i < n; ++i) code[i] = int32_t(uint32_t(p[i]) << 24) >> 24;
  return code;
}

// Codes without signs of finite numbers of magnitude up to 448, plus kCodeOffset. A number is rounded by adding 2^20
// times the power of two below it, at least 2^-6: the sum has no bits below those that e4m3 keeps.
constexpr uint32_t kCodeOffset = 1128;
static inline vu magnitude_codes(vf x) {
  const vu magnitude = (vu)x & kMagnitude;
  const vi power = (vi)(magnitude & kInfinite), least = splat_i(0x3c800000);
  const vu unit = (vu)(power > least ? power : least) + (20u << 23);
  const vu rounded = (vu)((vf)magnitude + (vf)unit);
  return (rounded - unit) + (unit >> 20);
}

// Codes of finite numbers of magnitude up to 448 / inverse, in the low bytes of the lanes.
static inline vu encode(vf x, float inverse) {
  return (((vu)x >> 24) & 0x80u) | (magnitude_codes(x * inverse) - kCodeOffset);
}

// The same of four vectors, to memory. Codes meet their signs as bytes.
static inline void encode_four(const vf (&x)[4], float inverse, uint8_t* p) {
#if VDIT_VL == 8 && defined(__AVX2__)
  const auto codes = [&](int i) __attribute__((always_inline)) { return (__m256i)magnitude_codes(x[i] * inverse); };
  const __m256i offset = _mm256_set1_epi16(kCodeOffset);
  const __m256i low = _mm256_sub_epi16(_mm256_packus_epi32(codes(0), codes(1)), offset);
  const __m256i high = _mm256_sub_epi16(_mm256_packus_epi32(codes(2), codes(3)), offset);
  const __m256i low_signs = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
  const __m256i high_signs = _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]);
  const __m256i signs = _mm256_and_si256(_mm256_packs_epi16(low_signs, high_signs), _mm256_set1_epi8(-128));
  const __m256i bytes = _mm256_or_si256(_mm256_packus_epi16(low, high), signs);  // packed in halves: 4 of each vector
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(bytes, order));
#else
  for (int i = 0; i < 4; ++i) store_codes(p + i * VL, encode(x[i], inverse), VL);
#endif
}

// The same of any numbers; what is not finite becomes NaN.
static inline vu encode_any(vf x, float inverse) {
  const vu finite = (vu)((vi)((vu)x & kMagnitude) < splat_i(int32_t(kInfinite)));
  return any_of(finite, encode(x, inverse), 0x7fu + vu{});
}

// What codes stand for under the scale 1.
static inline vf decode(vi code) {
  constexpr uint32_t kSign = 0x80000000, kNaN = 0x7fu << 20;
  const vu bits = (vu)(code << 20) & (kSign | kNaN);
  const vf value = (vf)bits * 0x1p120f;  // multiplying makes subnormals right as well
  return ((bits | kSign) == (kSign | kNaN)) ? (vf)(kMagnitude + vu{}) : value;
}

template <class T>
constexpr bool kCodes = false;
template <>
inline constexpr bool kCodes<e4m3> = true;

static inline vf load_lanes(const e4m3* p) { return decode(load_codes(reinterpret_cast<const uint8_t*>(p), VL)); }
static inline vf load_some(const e4m3* p, int n) { return decode(load_codes(reinterpret_cast<const uint8_t*>(p), n)); }

// The larger of `top` and the bits of magnitudes, in each lane; of finite ones only.
static inline vi largest(vi top, vf x) {
  const vi magnitude = (vi)((vu)x & kMagnitude);
  return magnitude > top ? magnitude : top;
}
static inline vi largest_finite(vi top, vf x) {
  const vi magnitude = (vi)((vu)x & kMagnitude);
  return (magnitude > top) & (magnitude < splat_i(int32_t(kInfinite))) ? magnitude : top;
}
static inline uint32_t largest_lane(vi top) {
  int32_t most = 0;
  for (int i = 0; i < VL; ++i) most = top[i] > most ? top[i] : most;
  return uint32_t(most);
}

// The biased exponent of the smallest power of two, at least 2^-126, with which a magnitude is at most 448 = 1.75 *
// 2^8.
static inline int scale_exponent(uint32_t magnitude) {
  const int exponent = int(magnitude >> 23) - 8 + ((magnitude & 0x7fffff) > 0x600000 ? 1 : 0);
  return exponent < 1 ? 1 : exponent;
}

static inline float power(int exponent) { return float_of(uint32_t(exponent) << 23); }

}  // namespace VDIT_NS

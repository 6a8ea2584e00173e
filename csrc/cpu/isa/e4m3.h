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

static inline vu load_codes(const uint8_t* p, int n) {
#if VDIT_VL == 8 && defined(__AVX2__)
  if (n == VL) return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  if (n == VL) return __builtin_convertvector((vb) * reinterpret_cast<const vb_u*>(p), vu);
#endif
  vu code{};
  for (int i = 0; i < n; ++i) code[i] = p[i];
  return code;
}

// Codes of finite numbers of magnitude up to 448 / inverse, in the low bytes of the lanes. A number is rounded by
// adding 2^20 times the power of two below it, at least 2^-6: the sum has no bits below those that e4m3 keeps.
static inline vu encode(vf x, float inverse) {
  const vu bits = (vu)(x * inverse), magnitude = bits & kMagnitude;
  const vi power = (vi)(magnitude & kInfinite), least = splat_i(0x3c800000);
  const vu unit = (vu)(power > least ? power : least) + (20u << 23);
  const vu rounded = (vu)((vf)magnitude + (vf)unit);
  return ((bits >> 24) & 0x80u) | ((rounded - unit) + ((unit >> 20) - 1128u));
}

// The same of any numbers; what is not finite becomes NaN.
static inline vu encode_any(vf x, float inverse) {
  const vu finite = (vu)((vi)((vu)x & kMagnitude) < splat_i(int32_t(kInfinite)));
  return any_of(finite, encode(x, inverse), 0x7fu + vu{});
}

// What codes stand for under the scale 1.
static inline vf decode(vu code) {
  const vf value = (vf)((code & 0x7fu) << 20) * 0x1p120f;  // multiplying makes subnormals right as well
  const vu number = (vu)value | ((code & 0x80u) << 24);
  return (vf)any_of((vu)((code & 0x7fu) == 0x7fu), kMagnitude + vu{}, number);
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

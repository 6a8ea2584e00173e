// 16-bit floats to fp32 and back, round to nearest even, NaN stays NaN. Compiled per instruction set: no std::
// templates.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace VDIT_NS {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

static inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
static inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
static inline void from_float(float x, float& y) { y = x; }
static inline void from_float(float x, bf16& y) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  y.bits = uint16_t((u & 0x7fffffff) > 0x7f800000 ? (u >> 16) | 0x40 : rounded);
}

#if defined(__F16C__)
static inline float to_float(f16 x) { return _cvtsh_ss(x.bits); }
static inline void from_float(float x, f16& y) { y.bits = uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
#else
static inline float to_float(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t rest = uint32_t(x.bits & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) return float_of(sign | 0x7f800000 | rest);
  // The exponent bias grows by 112; multiplying, not adding to the exponent, makes subnormals right as well.
  return float_of(bits_of(float_of(rest) * 0x1p112f) | sign);
}
static inline void from_float(float x, f16& y) {
  const uint32_t u = bits_of(x);
  const uint32_t sign = u >> 16 & 0x8000;
  const uint32_t rest = u & 0x7fffffff;
  uint32_t h;
  if (rest > 0x7f800000) {
    h = 0x7e00;  // NaN
  } else if (rest >= 0x477ff000) {
    h = 0x7c00;  // 65520 and above round to infinity
  } else if (rest < 0x38800000) {
    h = bits_of(float_of(rest) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds at 2^-24
  } else {
    h = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
  }
  y.bits = uint16_t(sign | h);
}
#endif

}  // namespace VDIT_NS

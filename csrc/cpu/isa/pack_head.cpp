#include "cpu/isa/lanes16.h"
#include "cpu/pack.h"

namespace VDIT_NS {
namespace {

typedef uint8_t vb __attribute__((vector_size(VL)));
typedef uint8_t vb_u __attribute__((vector_size(VL), aligned(1), may_alias));

constexpr uint32_t kMagnitude = 0x7fffffff, kInfinite = 0x7f800000;

inline vu any_of(vu where, vu yes, vu no) { return (yes & where) | (no & ~where); }

// Codes of numbers of magnitude up to 448, in the low bytes of the lanes; NaN and infinity are 0x7f.
inline vu encode(vf x, float inverse) {
  const vf y = x * inverse;
  const vu sign = ((vu)y >> 24) & 0x80u, magnitude = (vu)y & kMagnitude;
  const vu normal = ((magnitude + (0x7ffffu + ((magnitude >> 20) & 1u))) >> 20) - 960u;
  const vu small = (vu)((vf)magnitude + 16384.f) - 0x46800000u;  // the addition rounds at 2^-9
  const vu code = sign | any_of((vu)(magnitude < 0x3c800000u), small, normal);
  return any_of((vu)(((vu)x & kMagnitude) >= kInfinite), 0x7fu + vu{}, code);
}

inline vf decode(vu code, float scale) {
  const vf value = (vf)((code & 0x7fu) << 20) * 0x1p120f;  // multiplying makes subnormals right as well
  const vf scaled = (vf)((vu)value | ((code & 0x80u) << 24)) * scale;
  return (vf)any_of((vu)((code & 0x7fu) == 0x7fu), kMagnitude + vu{}, (vu)scaled);
}

inline void store_codes(uint8_t* p, vu code, int n) {
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

inline vu load_codes(const uint8_t* p, int n) {
#if VDIT_VL == 8 && defined(__AVX2__)
  if (n == VL) return (vu)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  if (n == VL) return __builtin_convertvector((vb) * reinterpret_cast<const vb_u*>(p), vu);
#endif
  vu code{};
  for (int i = 0; i < n; ++i) code[i] = p[i];
  return code;
}

template <class T>
inline vf load_up_to(const T* p, int n) {
  return n == VL ? load_lanes(p) : load_some(p, n);
}
template <class T>
inline void store_up_to(T* p, vf v, int n) {
  if (n == VL) return store_lanes(p, v);
  store_some(p, v, n);
}
// visit(first, how many) for all whole vectors of n, then for the rest.
template <class Visit>
inline void over_lanes(int64_t n, Visit visit) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) visit(i, VL);
  if (i < n) visit(i, int(n - i));
}

// The biased exponent of the smallest power of two, at least 2^-126, with which no finite magnitude is beyond 448.
template <class T>
int scale_exponent(const T* x, int64_t n) {
  vu top{};
  over_lanes(n, [&](int64_t i, int some) __attribute__((always_inline)) {
    const vu magnitude = (vu)load_up_to(x + i, some) & kMagnitude;
    const vu counts = (vu)(magnitude < kInfinite) & magnitude;
    top = any_of((vu)(counts > top), counts, top);
  });
  uint32_t most = 0;
  for (int i = 0; i < VL; ++i) most = top[i] > most ? top[i] : most;
  const int exponent = int(most >> 23) - 8 + ((most & 0x7fffff) > 0x600000 ? 1 : 0);  // 448 = 1.75 * 2^8
  return exponent < 1 ? 1 : exponent;
}

inline float power(int exponent) { return float_of(uint32_t(exponent) << 23); }

template <class T>
void to_e4m3(const vdit::PackHead& h) {
  const T* x = static_cast<const T*>(h.x);
  uint8_t *codes = static_cast<uint8_t*>(h.packed), *scale = h.scales;
  for (int64_t d = 0; d < h.dim; d += h.block, ++scale) {
    const int64_t n = h.dim - d < h.block ? h.dim - d : h.block;
    const int exponent = scale_exponent(x + d, n);
    *scale = uint8_t(exponent);
    const float inverse = power(254 - exponent);
    over_lanes(n, [&](int64_t i, int some) __attribute__((always_inline)) {
      store_codes(codes + d + i, encode(load_up_to(x + d + i, some), inverse), some);
    });
  }
}

constexpr float largest(float) { return 3.40282347e38f; }
constexpr float largest(bf16) { return 3.38953139e38f; }
constexpr float largest(f16) { return 65504.f; }

template <class T>
void from_e4m3(const vdit::PackHead& h) {
  T* x = static_cast<T*>(h.x);
  const auto* codes = static_cast<const uint8_t*>(h.packed);
  const vf limit = splat(largest(T{}));
  for (int64_t d = 0; d < h.dim; d += h.block) {
    const int64_t n = h.dim - d < h.block ? h.dim - d : h.block;
    const float scale = power(h.scales[d / h.block]);
    over_lanes(n, [&](int64_t i, int some) __attribute__((always_inline)) {
      const vf v = decode(load_codes(codes + d + i, some), scale);
      store_up_to(x + d + i, max_or_second(-limit, min_or_second(limit, v)), some);  // NaN stays NaN
    });
  }
}

template <class From, class To>
void convert(const void* from, void* to, int64_t n) {
  over_lanes(n, [&](int64_t i, int some) __attribute__((always_inline)) {
    store_up_to(static_cast<To*>(to) + i, load_up_to(static_cast<const From*>(from) + i, some), some);
  });
}

template <class T>
void compress(const vdit::PackHead& h) {
  if (h.format == vdit::PackFormat::e4m3) return to_e4m3<T>(h);
  convert<T, bf16>(h.x, h.packed, h.dim);
}
template <class T>
void expand(const vdit::PackHead& h) {
  if (h.format == vdit::PackFormat::e4m3) return from_e4m3<T>(h);
  convert<bf16, T>(h.packed, h.x, h.dim);
}

}  // namespace

void compress_head(const vdit::PackHead& h) {
  switch (h.dtype) {
    case vdit::DType::f32: return compress<float>(h);
    case vdit::DType::f16: return compress<f16>(h);
    case vdit::DType::bf16: return compress<bf16>(h);
  }
}

void expand_head(const vdit::PackHead& h) {
  switch (h.dtype) {
    case vdit::DType::f32: return expand<float>(h);
    case vdit::DType::f16: return expand<f16>(h);
    case vdit::DType::bf16: return expand<bf16>(h);
  }
}

}  // namespace VDIT_NS

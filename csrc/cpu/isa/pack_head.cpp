#include "cpu/isa/e4m3.h"
#include "cpu/pack.h"

namespace VDIT_NS {
namespace {

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

// The bits of the largest magnitude of neighbours; of finite ones only, or of infinities and NaN too.
template <bool kFinite, class T>
uint32_t largest_of(const T* x, int64_t n) {
  vi top{};
  over_lanes(n, [&](int64_t i, int some) __attribute__((always_inline)) {
    const vf v = load_up_to(x + i, some);
    top = kFinite ? largest_finite(top, v) : largest(top, v);
  });
  return largest_lane(top);
}

template <class T>
void to_e4m3(const vdit::PackHead& h) {
  const T* x = static_cast<const T*>(h.x);
  uint8_t *codes = static_cast<uint8_t*>(h.packed), *scale = h.scales;
  for (int64_t d = 0; d < h.dim; d += h.block, ++scale) {
    const int64_t n = h.dim - d < h.block ? h.dim - d : h.block;
    const T* const from = x + d;
    uint8_t* const to = codes + d;
    uint32_t most = largest_of<false>(from, n);
    const bool finite = most < kInfinite;
    if (!finite) most = largest_of<true>(from, n);
    const int exponent = scale_exponent(most);
    *scale = uint8_t(exponent);
    const float inverse = power(254 - exponent);
    int64_t done = 0;
    if (finite)
      for (; done + 4 * VL <= n; done += 4 * VL) {
        const T* const v = from + done;
        encode_four({load_lanes(v), load_lanes(v + VL), load_lanes(v + 2 * VL), load_lanes(v + 3 * VL)}, inverse,
                    to + done);
      }
    over_lanes(n - done, [&](int64_t i, int some) __attribute__((always_inline)) {
      store_codes(to + done + i, encode_any(load_up_to(from + done + i, some), inverse), some);
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
      const vf v = decode(load_codes(codes + d + i, some)) * scale;
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

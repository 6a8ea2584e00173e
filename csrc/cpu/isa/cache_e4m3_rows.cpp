// factor_update with factors in e4m3. The new factors of a row must be known before its scales are: they are computed
// into scratch rows, which stay in the caches, with the largest magnitude of each, and encoded from there.
#include "cpu/isa/cache_steps.h"
#include "cpu/isa/e4m3.h"

namespace VDIT_NS {
namespace {

using vdit::DType;
using vdit::FactorUpdateParams;

// The numbers of a row of the scale 2^120 within what has a code there.
void keep_in_range(float* row, int dim) {
  each(dim, [=](int i, auto, int) __attribute__((always_inline)) {
    const vu bits = (vu)load(row + i), magnitude = bits & kMagnitude;
    const vu beyond = (vu)(magnitude > vdit::kTopBits) & (vu)(magnitude < kInfinite);
    store(row + i, (vf)any_of(beyond, (bits & ~kMagnitude) | vdit::kTopBits, bits));
  });
}

// The largest finite magnitude of a row.
uint32_t largest_finite_of(const float* row, int dim) {
  vi top{};
  each(dim, [&](int i, auto, int) __attribute__((always_inline)) { top = largest_finite(top, load(row + i)); });
  return largest_lane(top);
}

inline int count(All) { return VL; }
inline int count(Some s) { return s.n; }

template <class O>
struct Update {
  const FactorUpdateParams& p;
  float* const scratch;
  const int64_t ld;  // of rows of scratch

  Update(const FactorUpdateParams& params, float* rows)
      : p(params), scratch(rows), ld((int64_t(params.dim) + 15) / 16 * 16) {}

  uint8_t* codes(int f, const Place& place) const {
    return static_cast<uint8_t*>(p.factors) + f * p.factor_stride + place.offset;
  }

  // The new factors of a row into scratch; the largest magnitude of each, of infinities and NaN too.
  void differences(const Place& place, int64_t at, vi (&top)[vdit::kMaxFactors]) const {
    const O *const output = place.row<O>(p.output), *const minus = place.row<O>(p.minus);
    const auto* const factors = reinterpret_cast<const e4m3*>(codes(0, place));
    const vf distance = splat(p.distance);
    const int64_t factor_stride = p.factor_stride, row = ld;
    const int last = p.last;
    float* const to = scratch;
    float scale[vdit::kMaxFactors];
    for (int f = 0; f < last; ++f) scale[f] = p.scales[f * p.scale_stride + at];
    steps(place.dim, [&](int i, auto part, auto vectors) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value;
      if (begins_page<O>(place.offset + i)) {
        ask_ahead(output + i);
        if (minus != nullptr) ask_ahead(minus + i);
        for (int f = 0; f < last; ++f) ask_ahead(factors + f * factor_stride + i);
      }
      vf v[kVectors];
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) v[k] = get(output + i + k * VL, part);
      if (minus != nullptr) {
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) v[k] -= get(minus + i + k * VL, part);
      }
      for (int f = 0;; ++f) {
        vi most = top[f];
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) {
          store(to + f * row + i + k * VL, v[k]);
          most = largest(most, v[k]);
        }
        top[f] = most;
        if (f == last) break;
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k)
          v[k] = (v[k] - get(factors + f * factor_stride + i + k * VL, part) * scale[f]) / distance;
      }
    });
  }

  void row(int64_t at) const {
    const Place place(p, at);
    vi top[vdit::kMaxFactors]{};
    differences(place, at, top);
    for (int f = 0; f <= p.last; ++f) {
      float* const from = scratch + f * ld;
      uint8_t* const to = codes(f, place);
      uint32_t most = largest_lane(top[f]);
      const bool finite = most < kInfinite;
      if (!finite) most = largest_finite_of(from, place.dim);
      const int exponent = scale_exponent(most);
      if (exponent == vdit::kTopExponent) keep_in_range(from, place.dim);
      p.scales[f * p.scale_stride + at] = power(exponent);
      const float inverse = power(254 - exponent);
      if (finite)
        steps(place.dim, [=](int i, auto part, auto vectors) __attribute__((always_inline)) {
          const float* const x = from + i;
          if constexpr (decltype(vectors)::value == 4)
            encode_four({load(x), load(x + VL), load(x + 2 * VL), load(x + 3 * VL)}, inverse, to + i);
          else
            store_codes(to + i, encode(load(x), inverse), count(part));
        });
      else
        each(place.dim, [=](int i, auto part, int) __attribute__((always_inline)) {
          store_codes(to + i, encode_any(load(from + i), inverse), count(part));
        });
    }
  }
};

template <class O>
void update(const FactorUpdateParams& p, int64_t first, int64_t last, float* scratch) {
  const Update<O> rows(p, scratch);
  for (int64_t at = first; at < last; ++at) rows.row(at);
}

}  // namespace

void factor_update_e4m3_rows(const FactorUpdateParams& p, int64_t first, int64_t last, float* scratch) {
  switch (p.output.dtype) {
    case DType::f32: return update<float>(p, first, last, scratch);
    case DType::f16: return update<f16>(p, first, last, scratch);
    case DType::bf16: return update<bf16>(p, first, last, scratch);
  }
}

}  // namespace VDIT_NS

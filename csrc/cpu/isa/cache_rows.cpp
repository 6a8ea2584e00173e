// The feature cache's kernels: every element is read, worked on in registers and written once, four vectors at a time,
// so that the loops over factors and modules cost little beside the memory; what is used most is compiled for its
// numbers of factors and modules (5 to 10 % in fp32, up to 40 % of an update in bf16). Rows of gates are converted and
// completed when they change, which is rarely: neighbouring tokens mostly share them.
#include "cpu/isa/cache_steps.h"
#include "cpu/isa/e4m3.h"
#include "kernels/cache/cache.h"

namespace VDIT_NS {
namespace {

using vdit::DType;
using vdit::FactorUpdateParams;
using vdit::ForecastModule;
using vdit::ForecastParams;

template <class T>
void put_streamed(T* p, vf v, All) {
  stream_lanes(p, v);
}
template <class T>
void put_streamed(T* p, vf v, Some s) {
  store_some(p, v, s.n);
}
template <class T>
bool streams(const T* row, int32_t wanted) {
  return wanted && reinterpret_cast<uintptr_t>(row) % kLaneBytes<T> == 0;
}

// Numbers of 16 bits as they are in memory, for what goes from one tensor to another of its type: to round again what
// is rounded costs as much as a factor.
template <class T>
inline vh bits_at(const T* p, All) {
  return *reinterpret_cast<const vh_u*>(p);
}
template <class T>
inline vh bits_at(const T* p, Some s) {
  vh bits{};
  __builtin_memcpy(&bits, p, size_t(s.n) * 2);
  return bits;
}
template <class T>
inline void put_bits(T* p, vh bits, All, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if (stream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
#elif defined(__AVX__)
  if (stream) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)bits);
#endif
  *reinterpret_cast<vh_u*>(p) = bits;
}
template <class T>
inline void put_bits(T* p, vh bits, Some s, bool) {
  __builtin_memcpy(p, &bits, size_t(s.n) * 2);
}

// kLast: p.last, or -1 for any. kCopy: F_0 is the output itself, in 16 bits both.
template <int kLast, bool kCopy, class O, class F>
void update_row(const FactorUpdateParams& p, int64_t at) {
  const Place place(p, at);
  const O *const output = place.row<O>(p.output), *const minus = place.row<O>(p.minus);
  F* const factors = static_cast<F*>(p.factors) + place.offset;
  const int64_t factor_stride = p.factor_stride;
  const int last = kLast >= 0 ? kLast : p.last;
  const bool stream = streams(factors + last * factor_stride, p.stream);
  const vf distance = splat(p.distance);
  steps(place.dim, [&](int i, auto part, auto vectors) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(vectors)::value;
    if (begins_page<F>(place.offset + i)) {
      ask_ahead(output + i);
      if (minus != nullptr) ask_ahead(minus + i);
      for (int f = 0; f < last; ++f) ask_ahead(factors + f * factor_stride + i);
    }
    F* factor = factors + i;
    vh bits[kVectors];
    if constexpr (kCopy) {
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) bits[k] = bits_at(output + i + k * VL, part);
      if (last == 0) {
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) put_bits(factor + k * VL, bits[k], part, stream);
        return;
      }
    }
    vf v[kVectors];
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) v[k] = get(output + i + k * VL, part);
    if (minus != nullptr) {
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) v[k] -= get(minus + i + k * VL, part);
    }
    for (int f = 0; f < last; ++f, factor += factor_stride) {
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const vf old = get(factor + k * VL, part);
        if (kCopy && f == 0)
          put_bits(factor + k * VL, bits[k], part, false);
        else
          put(factor + k * VL, v[k], part);
        v[k] = (v[k] - old) / distance;
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      if (stream)
        put_streamed(factor + k * VL, v[k], part);
      else
        put(factor + k * VL, v[k], part);
    }
  });
}

// Of a factor; scale: of the row, where there are scales.
template <class F, class Part>
inline vf value(const F* p, Part part, float scale) {
  const vf v = get(p, part);
  if constexpr (kCodes<F>) return v * scale;
  return v;
}

template <class X, class F, class H>
struct Forecast {
  const ForecastParams& p;
  float* gate[vdit::kMaxForecastModules];
  const void* gate_row[vdit::kMaxForecastModules] = {};

  Forecast(const ForecastParams& params, float* scratch) : p(params) {
    const int64_t ld = (int64_t(p.dim) + 15) / 16 * 16;
    for (int j = 0; j < p.modules; ++j) gate[j] = p.module[j].gate.data != nullptr ? scratch + j * ld : nullptr;
  }

  void find_gates(const Place& place) {
    for (int j = 0; j < p.modules; ++j) {
      const void* row = row_of(p, p.module[j].gate, place.b, place.n);
      if (row == nullptr || row == gate_row[j]) continue;
      gate_row[j] = row;
      complete_row<H>(p, p.module[j].gate, row, gate[j], [](vf v) { return v; });
    }
  }

  // kModules, kFactors: their numbers, or 0 for any.
  template <bool kRound, int kModules, int kFactors>
  void row(int64_t at) {
    const Place place(p, at);
    find_gates(place);
    const X* const x = place.row<X>(p.x);
    X* const out = static_cast<X*>(p.out) + place.b * p.out_batch_stride + place.n * p.out_token_stride;
    const bool stream = streams(out, p.stream);
    const int modules = kModules != 0 ? kModules : p.modules, factors = kFactors != 0 ? kFactors : p.factors;
    // Copies, since a store through a vector might change what p and this point to, for all that the compiler knows.
    vf weight[vdit::kMaxFactors];
    for (int f = 0; f < factors; ++f) weight[f] = splat(p.weight[f]);
    ForecastModule module[vdit::kMaxForecastModules];
    const float* gates[vdit::kMaxForecastModules];
    float scale[vdit::kMaxForecastModules][vdit::kMaxFactors]{};
    for (int j = 0; j < modules; ++j) {
      module[j] = p.module[j];
      gates[j] = gate[j];
      if constexpr (kCodes<F>)
        for (int f = 0; f < factors; ++f) scale[j][f] = module[j].scales[f * module[j].scale_stride + at];
    }
    steps(place.dim, [&](int i, auto part, auto vectors) __attribute__((always_inline)) {
      constexpr int kVectors = decltype(vectors)::value;
      const int64_t offset = place.offset + i;
      if (begins_page<F>(offset)) {
        if (x != nullptr) ask_ahead(x + i);
        for (int j = 0; j < modules; ++j)
          for (int f = 0; f < factors; ++f)
            ask_ahead(static_cast<const F*>(module[j].factors) + f * module[j].factor_stride + offset);
      }
      vf total[kVectors]{}, v[kVectors];
      if (x != nullptr) {
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) total[k] = get(x + i + k * VL, part);
      }
#pragma GCC unroll 3
      for (int j = 0; j < modules; ++j) {
        const F* factor = static_cast<const F*>(module[j].factors) + offset;
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) v[k] = weight[0] * value(factor + k * VL, part, scale[j][0]);
        for (int f = 1; f < factors; ++f) {
          factor += module[j].factor_stride;
#pragma GCC unroll 4
          for (int k = 0; k < kVectors; ++k) v[k] += weight[f] * value(factor + k * VL, part, scale[j][f]);
        }
        const float* const g = gates[j];
        const bool round_gated = kRound && module[j].gate.round;
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) {
          if (kRound) v[k] = round_lanes<X>(v[k]);
          if (g != nullptr) v[k] *= load(g + i + k * VL);
          if (round_gated) v[k] = round_lanes<X>(v[k]);
          total[k] += v[k];
          if (kRound) total[k] = round_lanes<X>(total[k]);
        }
      }
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        if (stream)
          put_streamed(out + i + k * VL, total[k], part);
        else
          put(out + i + k * VL, total[k], part);
      }
    });
  }

  template <bool kRound, int kModules, int kFactors>
  void rows(int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) row<kRound, kModules, kFactors>(at);
  }
  template <int kModules>
  void plain(int64_t first, int64_t last) {
    if (p.factors == 2) return rows<false, kModules, 2>(first, last);
    rows<false, kModules, 0>(first, last);
  }
  void run(int64_t first, int64_t last) {
    if (p.round) return rows<true, 0, 0>(first, last);
    if constexpr (VL > 4) {  // the generic build is not for speed
      if (p.modules == 1) return plain<1>(first, last);
      if (p.modules == 3) return plain<3>(first, last);
    }
    rows<false, 0, 0>(first, last);
  }
};

template <int kLast, bool kCopy, class O, class F>
void update_rows(const FactorUpdateParams& p, int64_t first, int64_t last) {
  for (int64_t at = first; at < last; ++at) update_row<kLast, kCopy, O, F>(p, at);
}

template <class O, class F>
void update(const FactorUpdateParams& p, int64_t first, int64_t last) {
  if constexpr (sizeof(O) == 2 && sizeof(F) == 2) {  // bound by what is computed, not by memory
    if (p.minus.data == nullptr) {
      switch (p.last) {
        case 0: return update_rows<0, true, O, F>(p, first, last);
        case 1: return update_rows<1, true, O, F>(p, first, last);
        case 2: return update_rows<2, true, O, F>(p, first, last);
        default: return update_rows<-1, true, O, F>(p, first, last);
      }
    }
  }
  update_rows<-1, false, O, F>(p, first, last);
}

template <class H>
void update_half(const FactorUpdateParams& p, int64_t first, int64_t last) {
  const bool wide = p.factor_dtype == DType::f32;
  if (p.output.dtype == DType::f32)
    return wide ? update<float, float>(p, first, last) : update<float, H>(p, first, last);
  return wide ? update<H, float>(p, first, last) : update<H, H>(p, first, last);
}

template <class X, class F, class H>
void forecast(const ForecastParams& p, int64_t first, int64_t last, float* scratch) {
  Forecast<X, F, H>(p, scratch).run(first, last);
}

template <class X, class H>
void forecast_to(const ForecastParams& p, int64_t first, int64_t last, float* scratch) {
  if (p.module[0].scales != nullptr) return forecast<X, e4m3, H>(p, first, last, scratch);
  if (p.factor_dtype == DType::f32) return forecast<X, float, H>(p, first, last, scratch);
  forecast<X, H, H>(p, first, last, scratch);
}

template <class H>
void forecast_half(const ForecastParams& p, int64_t first, int64_t last, float* scratch) {
  if (p.out_dtype == DType::f32) return forecast_to<float, H>(p, first, last, scratch);
  forecast_to<H, H>(p, first, last, scratch);
}

}  // namespace

void factor_update_rows(const vdit::FactorUpdateParams& p, int64_t first, int64_t last) {
  if (p.half == DType::f16)
    update_half<f16>(p, first, last);
  else
    update_half<bf16>(p, first, last);
  if (p.stream) stream_fence();
}

void forecast_rows(const vdit::ForecastParams& p, int64_t first, int64_t last, float* scratch) {
  if (p.half == DType::f16)
    forecast_half<f16>(p, first, last, scratch);
  else
    forecast_half<bf16>(p, first, last, scratch);
  if (p.stream) stream_fence();
}

}  // namespace VDIT_NS

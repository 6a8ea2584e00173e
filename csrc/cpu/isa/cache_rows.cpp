// The feature cache's kernels: every element is read, worked on in registers and written once, four vectors at a time,
// so that the loops over factors and modules cost little beside the memory. Rows of gates are converted and completed
// when they change, which is rarely: neighbouring tokens mostly share them.
#include "cpu/isa/table_rows.h"
#include "kernels/cache/cache.h"

namespace VDIT_NS {
namespace {

using vdit::DType;
using vdit::FactorUpdateParams;
using vdit::ForecastModule;
using vdit::ForecastParams;

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// f(first column, All or Some, how many vectors)
template <class F>
inline void steps(int dim, F f) {
  int i = 0;
  for (; i + 4 * VL <= dim; i += 4 * VL) f(i, All{}, Vectors<4>{});
  for (; i + VL <= dim; i += VL) f(i, All{}, Vectors<1>{});
  if (i < dim) f(i, Some{dim - i}, Vectors<1>{});
}

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

// Where row `at` begins and ends.
struct Place {
  int64_t b, n, offset;
  int dim;

  template <class Params>
  Place(const Params& p, int64_t at) : b(at / p.tokens), n(at % p.tokens), offset(at * p.dim) {
    dim = p.total - offset < p.dim ? int(p.total - offset) : p.dim;
  }
  template <class T>
  const T* row(const vdit::AdaLNRows& t) const {
    if (t.data == nullptr) return nullptr;
    return static_cast<const T*>(t.data) + b * t.batch_stride + n * t.token_stride;
  }
};

template <class O, class F>
void update_row(const FactorUpdateParams& p, int64_t at) {
  const Place place(p, at);
  const O *const output = place.row<O>(p.output), *const minus = place.row<O>(p.minus);
  F* const factors = static_cast<F*>(p.factors) + place.offset;
  const bool stream = streams(factors + p.last * p.factor_stride, p.stream);
  const vf distance = splat(p.distance);
  steps(place.dim, [&](int i, auto part, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    vf v[kVectors];
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) v[k] = get(output + i + k * VL, part);
    if (minus != nullptr) {
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) v[k] -= get(minus + i + k * VL, part);
    }
    F* factor = factors + i;
    for (int f = 0; f < p.last; ++f, factor += p.factor_stride) {
#pragma GCC unroll 4
      for (int k = 0; k < kVectors; ++k) {
        const vf old = get(factor + k * VL, part);
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
      if (row == gate_row[j]) continue;
      gate_row[j] = row;
      complete_row<H>(p, p.module[j].gate, row, gate[j], [](vf v) { return v; });
    }
  }

  template <bool kRound>
  void row(int64_t at) {
    const Place place(p, at);
    find_gates(place);
    const X* const x = place.row<X>(p.x);
    X* const out = static_cast<X*>(p.out) + place.b * p.out_batch_stride + place.n * p.out_token_stride;
    const bool stream = streams(out, p.stream);
    steps(place.dim, [&](int i, auto part, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      vf total[kVectors]{}, v[kVectors];
      if (x != nullptr) {
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) total[k] = get(x + i + k * VL, part);
      }
      for (int j = 0; j < p.modules; ++j) {
        const ForecastModule& module = p.module[j];
        const F* factor = static_cast<const F*>(module.factors) + place.offset + i;
#pragma GCC unroll 4
        for (int k = 0; k < kVectors; ++k) v[k] = p.weight[0] * get(factor + k * VL, part);
        for (int f = 1; f < p.factors; ++f) {
          factor += module.factor_stride;
          const vf weight = splat(p.weight[f]);
#pragma GCC unroll 4
          for (int k = 0; k < kVectors; ++k) v[k] += weight * get(factor + k * VL, part);
        }
        const float* const g = gate[j];
        const bool round_gated = kRound && module.gate.round;
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
};

template <class O, class F>
void update(const FactorUpdateParams& p, int64_t first, int64_t last) {
  for (int64_t at = first; at < last; ++at) update_row<O, F>(p, at);
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
  Forecast<X, F, H> rows(p, scratch);
  for (int64_t at = first; at < last; ++at) {
    if (p.round)
      rows.template row<true>(at);
    else
      rows.template row<false>(at);
  }
}

template <class X, class H>
void forecast_to(const ForecastParams& p, int64_t first, int64_t last, float* scratch) {
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

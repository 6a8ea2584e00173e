// Features of tiles of tokens, and the two products of linear attention, by the register-blocked product of vec.h.
#include "cpu/linear_attention.h"

#include "cpu/isa/lanes16.h"

namespace VDIT_NS {
namespace {

using vdit::DType;
using vdit::FeatureMap;
using vdit::kLinearAlign;
using vdit::kLinearTile;
using vdit::linear_round;
using vdit::LinearReadoutParams;
using vdit::LinearStateParams;
using vdit::LinearWeight;
using vdit::TokenRows;

constexpr float kLog2e = 1.44269504088896340736f;

// Rows of `n` columns, zeros up to linear_round(n).
template <class T>
void load_rows(const TokenRows& x, int64_t batch, int64_t head, int64_t first, int rows, int n, float* to) {
  const T* from = static_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride + first * x.row_stride;
  const int ld = int(linear_round(n));
  for (int i = 0; i < rows; ++i, from += x.row_stride, to += ld) {
    int j = 0;
    for (; j + VL <= n; j += VL) store(to + j, load_lanes(from + j));
    for (; j < ld; j += VL) store(to + j, j < n ? load_some(from + j, n - j) : vf{});
  }
}

// The first n lanes of v, `other` in the rest.
inline vf keep_first(vf v, int n, float other) {
  vi lane;
  for (int i = 0; i < VL; ++i) lane[i] = i;
  return lane < splat_i(n) ? v : splat(other);
}

// softmax(x) to `positive` and softmax(-x) to `negative`, both over n columns. Writes up to VL - 1 floats behind n.
void hedgehog_row(const float* x, int n, float* positive, float* negative) {
  vf top = splat(-kInf), low = splat(kInf);
  int j = 0;
  for (; j + VL <= n; j += VL) {
    top = max_or_second(top, load(x + j));
    low = min_or_second(low, load(x + j));
  }
  if (j < n) {
    top = max_or_second(top, keep_first(load(x + j), n - j, -kInf));
    low = min_or_second(low, keep_first(load(x + j), n - j, kInf));
  }
  float most = top[0], least = low[0];
  for (int i = 1; i < VL; ++i) {
    most = most > top[i] ? most : top[i];
    least = least < low[i] ? least : low[i];
  }
  const vf most2 = splat(most * kLog2e), least2 = splat(least * kLog2e);
  vf sum_p{}, sum_n{};
  for (j = 0; j + VL <= n; j += VL) {
    const vf y = load(x + j) * kLog2e;
    const vf p = exp2_nonpositive(y - most2), q = exp2_nonpositive(least2 - y);
    sum_p += p;
    sum_n += q;
    store(positive + j, p);
    store(negative + j, q);
  }
  if (j < n) {
    const vf y = load(x + j) * kLog2e;
    const vf p = keep_first(exp2_nonpositive(y - most2), n - j, 0.f);
    const vf q = keep_first(exp2_nonpositive(least2 - y), n - j, 0.f);
    sum_p += p;
    sum_n += q;
    store_some(positive + j, p, n - j);
    store(negative + j, q);
  }
  const vf scale_p = splat(1.f / reduce_sum(sum_p)), scale_n = splat(1.f / reduce_sum(sum_n));
  for (j = 0; j + VL <= n; j += VL) store(positive + j, load(positive + j) * scale_p);
  for (; j < n; ++j) positive[j] *= scale_p[0];
  for (j = 0; j < n; j += VL) store(negative + j, load(negative + j) * scale_n);
}

void map_row(FeatureMap map, const float* x, int n, float* to) {
  for (int j = 0; j < n; j += VL) {
    const vf v = load(x + j);
    if (map == FeatureMap::relu) {
      store(to + j, max_or_second(vf{}, v));
    } else {
      store(to + j, v > 0.f ? v + 1.f : exp2_nonpositive(v * kLog2e));
    }
  }
}

// Memory of a work item, cut up.
struct Scratch {
  float *x, *y, *phi, *values;
  Scratch(float* at, int dim, int features)
      : x(at),
        y(x + kLinearTile * linear_round(dim)),
        phi(y + kLinearTile * linear_round(dim)),
        values(phi + kLinearTile * row(features)) {}
  static int64_t row(int features) { return linear_round(features) + kLinearAlign; }
};

// Features of tokens [first, first + rows): rows `*ld` floats apart.
template <class T, class Params>
const float* features(const Params& p, const TokenRows& tokens, int64_t batch, int64_t head, const float* weight,
                      int64_t first, int rows, const Scratch& s, int64_t* ld) {
  load_rows<T>(tokens, batch, head, first, rows, p.dim, s.x);
  const int width = int(linear_round(p.dim));
  if (p.map == FeatureMap::identity) {
    *ld = width;
    return s.x;
  }
  const float* x = s.x;
  if (weight != nullptr) {
    gemm<false>(rows, width, p.dim, s.x, width, weight, NR, int64_t{p.dim} * NR, s.y, width);
    x = s.y;
  }
  *ld = Scratch::row(feature_count(p.map, p.dim));
  for (int i = 0; i < rows; ++i) {
    float* to = s.phi + i * *ld;
    if (p.map == FeatureMap::hedgehog) {
      hedgehog_row(x + int64_t{i} * width, p.dim, to, to + p.dim);
    } else {
      map_row(p.map, x + int64_t{i} * width, p.dim, to);
    }
  }
  return s.phi;
}

template <class T>
void add_state(const LinearStateParams& p, int64_t batch, int64_t head, const float* weight, int64_t first,
               int64_t last, float* state, float* sums, float* scratch) {
  const int count = feature_count(p.map, p.dim), width = int(linear_round(p.dim_v));
  const Scratch s(scratch, p.dim, count);
  for (int64_t at = first; at < last; at += kLinearTile) {
    const int rows = int(last - at < kLinearTile ? last - at : kLinearTile);
    int64_t ld = 0;
    const float* phi = features<T>(p, p.k, batch, head, weight, at, rows, s, &ld);
    load_rows<T>(p.v, batch, head, at, rows, p.dim_v, s.values);
    gemm<true, true>(count, width, rows, phi, ld, s.values, width, NR, state, width);
    if (p.k_den.data != nullptr) phi = features<T>(p, p.k_den, batch, head, weight, at, rows, s, &ld);
    for (int j = 0; j < count; j += VL) {
      vf sum = load(sums + j);
      for (int i = 0; i < rows; ++i) sum += load(phi + i * ld + j);
      store(sums + j, sum);
    }
  }
}

// factors[i] = 1 / (phi_i . sums + eps), or 0.
void denominators(const float* phi, int64_t ld, int rows, int count, const float* sums, float eps, float* factors) {
  for (int i = 0; i < rows; ++i) {
    const float* row = phi + i * ld;
    vf total{};
    int j = 0;
    for (; j + VL <= count; j += VL) total += load(row + j) * load(sums + j);
    float sum = reduce_sum(total);
    for (; j < count; ++j) sum += row[j] * sums[j];
    sum += eps;
    factors[i] = sum == 0.f ? 0.f : 1.f / sum;
  }
}

template <class T>
void store_row(const float* from, float factor, int n, T* to) {
  int j = 0;
  for (; j + VL <= n; j += VL) store_lanes(to + j, factor == 0.f ? vf{} : load(from + j) * factor);
  if (j < n) store_some(to + j, factor == 0.f ? vf{} : load(from + j) * factor, n - j);
}

template <class T>
void read_out(const LinearReadoutParams& p, int64_t batch, int64_t head, const float* weight, const float* panels,
              const float* sums, int64_t first, int64_t last, float* scratch) {
  const int count = feature_count(p.map, p.dim), width = int(linear_round(p.dim_v));
  const Scratch s(scratch, p.dim, count);
  float factors[kLinearTile];
  for (int64_t at = first; at < last; at += kLinearTile) {
    const int rows = int(last - at < kLinearTile ? last - at : kLinearTile);
    int64_t ld = 0;
    const float* phi = features<T>(p, p.q, batch, head, weight, at, rows, s, &ld);
    if (p.q_den.data == nullptr) denominators(phi, ld, rows, count, sums, p.eps, factors);
    gemm<false>(rows, width, count, phi, ld, panels, NR, int64_t{count} * NR, s.values, width);
    if (p.q_den.data != nullptr) {
      phi = features<T>(p, p.q_den, batch, head, weight, at, rows, s, &ld);
      denominators(phi, ld, rows, count, sums, p.eps, factors);
    }
    for (int i = 0; i < rows; ++i) {
      const int64_t to = ((batch * p.length + at + i) * p.heads + head) * p.dim_v;
      store_row(s.values + int64_t{i} * width, factors[i], p.dim_v, static_cast<T*>(p.out) + to);
    }
  }
}

template <class T>
void pack_columns(const T* from, int64_t row_stride, int rows, int columns, float* panels) {
  for (int64_t n = 0; n < linear_round(columns); n += NR)
    for (int i = 0; i < rows; ++i, panels += NR)
      for (int j = 0; j < NR; ++j) panels[j] = n + j < columns ? to_float(from[i * row_stride + n + j]) : 0.f;
}

void pack_weight(const LinearWeight& w, int64_t head, int dim, float* panels) {
  const int64_t at = head * w.head_stride;
  switch (w.dtype) {
    case DType::f32: return pack_columns(static_cast<const float*>(w.data) + at, w.row_stride, dim, dim, panels);
    case DType::f16: return pack_columns(static_cast<const f16*>(w.data) + at, w.row_stride, dim, dim, panels);
    case DType::bf16: return pack_columns(static_cast<const bf16*>(w.data) + at, w.row_stride, dim, dim, panels);
  }
}

void pack_state(const float* state, int count, int dim_v, float* panels, float* sums) {
  pack_columns(state, dim_v + 1, count, dim_v, panels);
  for (int f = 0; f < count; ++f) sums[f] = state[int64_t{f} * (dim_v + 1) + dim_v];
}

void state_part(const LinearStateParams& p, int64_t batch, int64_t head, const float* weight, int64_t first,
                int64_t last, float* state, float* sums, float* scratch) {
  switch (p.dtype) {
    case DType::f32: return add_state<float>(p, batch, head, weight, first, last, state, sums, scratch);
    case DType::f16: return add_state<f16>(p, batch, head, weight, first, last, state, sums, scratch);
    case DType::bf16: return add_state<bf16>(p, batch, head, weight, first, last, state, sums, scratch);
  }
}

void readout_part(const LinearReadoutParams& p, int64_t batch, int64_t head, const float* weight, const float* panels,
                  const float* sums, int64_t first, int64_t last, float* scratch) {
  switch (p.dtype) {
    case DType::f32: return read_out<float>(p, batch, head, weight, panels, sums, first, last, scratch);
    case DType::f16: return read_out<f16>(p, batch, head, weight, panels, sums, first, last, scratch);
    case DType::bf16: return read_out<bf16>(p, batch, head, weight, panels, sums, first, last, scratch);
  }
}

}  // namespace

extern const vdit::LinearKernels linear_kernels;
const vdit::LinearKernels linear_kernels = {pack_weight, pack_state, state_part, readout_part};

}  // namespace VDIT_NS

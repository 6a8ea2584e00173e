// A row is read once into fp32 scratch that stays in the cache; mean and variance are exact passes over it. Rows of
// the tables are converted, completed (base, 1 +, tanh) and, where nothing is rounded in between, folded with the
// norm's weight and bias when they change, which is rarely: neighbouring tokens mostly share them.
#include <math.h>

#include "cpu/isa/table_rows.h"

namespace VDIT_NS {
namespace {

using vdit::AdaLNNorm;
using vdit::AdaLNParams;
using vdit::AdaLNTable;
using vdit::DType;
using vdit::NormKind;

void fill(float value, int dim, float* dst) {
  for (int i = 0; i < dim; ++i) dst[i] = value;
}

struct Moments {
  float mean = 0.f, scale = 1.f;  // normed = (x - mean) * scale
};

// total: the sum of the row (layer) or of its squares (rms).
Moments moments(const AdaLNNorm& norm, const float* row, int dim, float total) {
  if (norm.kind == NormKind::none) return {};
  Moments m;
  float squares = total;
  if (norm.kind == NormKind::layer) {
    m.mean = total / float(dim);
    vf sum[4]{};
    each(dim, [&](int i, auto part, int k) {
      const vf d = only(load(row + i) - m.mean, part);
      sum[k] += d * d;
    });
    squares = reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  m.scale = 1.f / __builtin_sqrtf(squares / float(dim) + norm.eps);
  return m;
}

struct Scratch {
  float *x, *y, *gate, *scale, *shift, *weight, *bias, *post_weight, *post_bias;
};

template <class X, class H>
struct Rows {
  const AdaLNParams& p;
  const int dim;
  Scratch s{};
  const void *gate_row = nullptr, *scale_row = nullptr, *shift_row = nullptr;  // what the scratch rows hold
  const bool chain;                                                            // something is rounded inside the norm

  Rows(const AdaLNParams& params, float* scratch)
      : p(params), dim(params.dim), chain(params.round_chain || params.norm.round) {
    const int64_t ld = (int64_t(dim) + 15) / 16 * 16;
    float** const all[] = {&s.x, &s.y, &s.gate, &s.scale, &s.shift, &s.weight, &s.bias, &s.post_weight, &s.post_bias};
    for (float** row : all) {
      *row = scratch;
      scratch += ld;
    }
    affine(p.norm, s.weight, s.bias);
    affine(p.post, s.post_weight, s.post_bias);
    fill(1.f, dim, s.gate);
    if (p.scale.data == nullptr && p.shift.data == nullptr) combine();
  }

  void affine(const AdaLNNorm& norm, float* weight, float* bias) const {
    if (norm.weight != nullptr)
      convert<H>(norm.weight, norm.dtype, dim, weight);
    else
      fill(1.f, dim, weight);
    if (norm.bias != nullptr)
      convert<H>(norm.bias, norm.dtype, dim, bias);
    else
      fill(0.f, dim, bias);
  }

  vf rounded(bool on, vf v) const { return on ? round_lanes<H>(v) : v; }

  template <class F>
  void complete(const AdaLNTable& t, const void* row, float* dst, F finish) const {
    complete_row<H>(p, t, row, dst, finish);
  }

  // The factor and the summand of the normed row.
  void combine() {
    if (scale_row != nullptr)
      complete(p.scale, scale_row, s.scale, [this](vf v) { return rounded(p.scale.round, v + 1.f); });
    else
      fill(1.f, dim, s.scale);
    if (shift_row != nullptr)
      complete(p.shift, shift_row, s.shift, [](vf v) { return v; });
    else
      fill(0.f, dim, s.shift);
    if (chain) return;
    each(dim, [this](int i, auto, int) {
      const vf scale = load(s.scale + i);
      store(s.shift + i, load(s.bias + i) * scale + load(s.shift + i));
      store(s.scale + i, load(s.weight + i) * scale);
    });
  }

  void find_rows(int64_t b, int64_t n) {
    const void* gate = row_of(p, p.gate, b, n);
    if (gate != gate_row) {
      gate_row = gate;
      complete(p.gate, gate, s.gate, [this](vf v) {
        if (p.tanh_gate)
          for (int i = 0; i < VL; ++i) v[i] = tanhf(v[i]);
        return rounded(p.tanh_gate && p.gate.round, v);
      });
    }
    const void *scale = row_of(p, p.scale, b, n), *shift = row_of(p, p.shift, b, n);
    if (scale != scale_row || shift != shift_row) {
      scale_row = scale;
      shift_row = shift;
      combine();
    }
  }

  // s.x = x, for the norm. Returns the sum that it needs.
  float copy(const X* x) const {
    const bool square = p.norm.kind == NormKind::rms;
    float* const to = s.x;
    vf sum[4]{};
    each(dim, [&](int i, auto part, int k) {
      const vf v = get(x + i, part);
      store(to + i, v);
      sum[k] += square ? v * v : v;
    });
    return reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  // out = x + gate * y; with kNorm also s.x, and the sum that the norm needs.
  template <bool kRound, bool kNorm, class Y>
  float residual(const X* x, const Y* y, X* out) const {
    const bool square = p.norm.kind == NormKind::rms, round_new = p.round_new;
    const float* const gate = s.gate;
    float* const to = s.x;
    vf sum[4]{};
    each(dim, [&](int i, auto part, int k) {
      vf gated = load(gate + i) * get(y + i, part);
      if (kRound) gated = round_lanes<H>(gated);
      vf v = get(x + i, part) + gated;
      put(out + i, v, part);
      if (!kNorm) return;
      if (round_new) v = round_lanes<X>(v);
      store(to + i, v);
      sum[k] += square ? v * v : v;
    });
    return reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }

  template <class Y>
  float residual(const X* x, const Y* y, X* out) const {
    if (p.h == nullptr) return p.round_gated ? residual<true, false>(x, y, out) : residual<false, false>(x, y, out);
    return p.round_gated ? residual<true, true>(x, y, out) : residual<false, true>(x, y, out);
  }

  // s.y = post(y)
  void post(const void* y) const {
    const bool square = p.post.kind == NormKind::rms;
    vf sum[4]{};
    typed<H>(y, p.y.dtype, [&](auto* from) {
      each(dim, [&](int i, auto part, int k) {
        const vf v = get(from + i, part);
        store(s.y + i, v);
        sum[k] += square ? v * v : v;
      });
    });
    if (p.post.kind == NormKind::none) return;
    const Moments m = moments(p.post, s.y, dim, reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3])));
    each(dim, [&](int i, auto, int) {
      vf v = rounded(p.post.round, (load(s.y + i) - m.mean) * m.scale);
      v = v * load(s.post_weight + i) + load(s.post_bias + i);
      store(s.y + i, rounded(p.round_post, v));
    });
  }

  void norm(X* h, const Moments& m) const {
    const float *const x = s.x, *const scale = s.scale, *const shift = s.shift, *const weight = s.weight,
                       *const bias = s.bias;
    const vf mean = splat(m.mean), factor = splat(m.scale);
    if (!chain)
      return each(dim, [&](int i, auto part, int) {
        put(h + i, (load(x + i) - mean) * factor * load(scale + i) + load(shift + i), part);
      });
    const bool affine = p.norm.weight != nullptr || p.norm.bias != nullptr;
    const bool round = p.round_chain, round_weight = p.norm.round;
    each(dim, [&](int i, auto part, int) {
      vf v = (load(x + i) - mean) * factor;
      if (affine) v = rounded(round_weight, v) * load(weight + i) + load(bias + i);
      v = rounded(round || round_weight, v);
      put(h + i, rounded(round, v * load(scale + i)) + load(shift + i), part);
    });
  }

  void row(int64_t b, int64_t n) {
    find_rows(b, n);
    const X* x = static_cast<const X*>(p.x.data) + b * p.x.batch_stride + n * p.x.token_stride;
    const int64_t at = (b * p.tokens + n) * dim;
    float total;
    if (p.y.data == nullptr) {
      total = copy(x);
    } else {
      X* out = static_cast<X*>(p.x_new) + at;
      const int64_t from = b * p.y.batch_stride + n * p.y.token_stride;
      const void* y = static_cast<const char*>(p.y.data) + from * (p.y.dtype == DType::f32 ? 4 : 2);
      if (p.post.kind == NormKind::none && p.y.dtype == p.x.dtype) {
        total = residual(x, static_cast<const X*>(y), out);
      } else {
        post(y);
        total = residual(x, static_cast<const float*>(s.y), out);
      }
    }
    if (p.h != nullptr) norm(static_cast<X*>(p.h) + at, moments(p.norm, s.x, dim, total));
  }
};

template <class X, class H>
void run(const AdaLNParams& p, int64_t first, int64_t last, float* scratch) {
  Rows<X, H> rows(p, scratch);
  for (int64_t at = first; at < last; ++at) rows.row(at / p.tokens, at % p.tokens);
}

template <class H>
void run_half(const AdaLNParams& p, int64_t first, int64_t last, float* scratch) {
  if (p.x.dtype == DType::f32) return run<float, H>(p, first, last, scratch);
  run<H, H>(p, first, last, scratch);
}

}  // namespace

void adaln_rows(const vdit::AdaLNParams& p, int64_t first, int64_t last, float* scratch) {
  if (p.half == DType::f16) return run_half<f16>(p, first, last, scratch);
  run_half<bf16>(p, first, last, scratch);
}

}  // namespace VDIT_NS

// Tokens of q, k and v: a token's row in fp32 in the L1 cache, its norm, then norm, RoPE and rounding in one sweep to
// the destination. Built with -ffp-contract=off: eager's products are rounded one by one.
#include "cpu/qk_norm_rope.h"

#include "cpu/isa/lanes16.h"

namespace VDIT_NS {
namespace {

using vdit::DType;
using vdit::QkNorm;
using vdit::QkNormRopeParams;
using vdit::QkRounding;
using vdit::QkStream;

// One lane in a vector, for what is left of a row: the arithmetic is that of the vectors.
template <class T>
vf lane(const T* p) {
  return splat(to_float(*p));
}
template <class T>
void store_lane(T* p, vf v) {
  T row[VL];
  store_lanes(row, v);
  *p = row[0];
}

template <class T>
void widen(const T* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + VL <= n; i += VL) store(to + i, load_lanes(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}
void widen(const void* from, DType type, int64_t n, float* to) {
  switch (type) {
    case DType::f32: return widen(static_cast<const float*>(from), n, to);
    case DType::f16: return widen(static_cast<const f16*>(from), n, to);
    case DType::bf16: return widen(static_cast<const bf16*>(from), n, to);
  }
}
const char* at(const void* base, DType type, int64_t elements) {
  return static_cast<const char*>(base) + elements * (type == DType::f32 ? 4 : 2);
}

// cos or sin of one row, one fp32 value per channel: the row itself where it is that already.
const float* table_row(const QkNormRopeParams& p, const void* base, DType type, bool half, int64_t offset, float* to) {
  const char* row = at(base, type, offset);
  if (!half && type == DType::f32) return reinterpret_cast<const float*>(row);
  if (!half) {
    widen(row, type, p.rotary, to);
  } else if (p.axes == 0) {
    widen(row, type, p.rotary / 2, to);
    for (int i = p.rotary / 2 - 1; i >= 0; --i) to[2 * i] = to[2 * i + 1] = to[i];
  } else {
    int from = 0, channel = 0;
    for (int axis = 0; axis < p.axes; ++axis) {
      const int n = p.width[axis] / 2;
      widen(at(row, type, from), type, n, to + channel);
      for (int i = 0; i < n; ++i) to[channel + n + i] = to[channel + i];
      from += n;
      channel += 2 * n;
    }
  }
  return to;
}

// What a stream needs all the time, in fp32.
struct Prepared {
  float *weight, *bias;  // weight null: none
  float *cos, *sin;
};

// One head of one token: y holds the row in fp32.
template <class T, QkRounding R>
struct Head {
  const float *y, *weight, *bias;
  float mean, scale;
  bool end;     // the norm's result is rounded
  bool before;  // before_weight, and the weight is of 16 bits or there is none
  bool relu, products;

  vf finish(vf v, vf w, vf b) const {
    v = (v - mean) * scale;
    if constexpr (R == QkRounding::before_weight) {
      if (before) v = round_lanes<T>(v);
    }
    if (weight != nullptr) {
      v *= w;
      if constexpr (R == QkRounding::before_weight) {
        if (before) v = round_lanes<T>(v);
      }
    }
    if (bias != nullptr) {
      v += b;
      if constexpr (R == QkRounding::before_weight) {
        if (before) v = round_lanes<T>(v);
      }
    }
    if constexpr (R == QkRounding::eager) {
      if (end) v = round_lanes<T>(v);
    }
    return relu ? max_or_second(vf{}, v) : v;
  }
  vf normed(int i) const {
    return finish(load(y + i), weight != nullptr ? load(weight + i) : vf{}, bias != nullptr ? load(bias + i) : vf{});
  }
  vf normed_lane(int i) const {
    return finish(splat(y[i]), splat(weight != nullptr ? weight[i] : 0), splat(bias != nullptr ? bias[i] : 0));
  }
  // a * c + b * s
  vf turn(vf a, vf b, vf c, vf s) const {
    vf x = a * c, z = b * s;
    if constexpr (R != QkRounding::fast) {
      if (products) {
        x = round_lanes<T>(x);
        z = round_lanes<T>(z);
      }
    }
    return x + z;
  }
  // Channels [first, last): the last vector overlaps the one before it.
  void plain(int first, int last, T* out) const {
    if (last - first < VL) {
      for (int i = first; i < last; ++i) store_lane(out + i, normed_lane(i));
      return;
    }
    for (int i = first; i < last; i += VL) {
      const int j = i + VL <= last ? i : last - VL;
      store_lanes(out + j, normed(j));
    }
  }
  void neighbours(int n, const float* cos, const float* sin, T* out) const {
    vf sign;
    for (int i = 0; i < VL; ++i) sign[i] = i % 2 == 0 ? -1.0f : 1.0f;
    if (n < VL) {
      for (int i = 0; i < n; i += 2) {
        const vf a = normed_lane(i), b = normed_lane(i + 1);
        store_lane(out + i, turn(a, -b, splat(cos[i]), splat(sin[i])));
        store_lane(out + i + 1, turn(b, a, splat(cos[i + 1]), splat(sin[i + 1])));
      }
      return;
    }
    for (int i = 0; i < n; i += VL) {
      const int j = i + VL <= n ? i : n - VL;  // even: n and VL are
      const vf v = normed(j);
      store_lanes(out + j, turn(v, swap_neighbours(v), load(cos + j), load(sin + j) * sign));
    }
  }
  // Channel i with i + n, for i in [first, first + n).
  void halves(int first, int n, const float* cos, const float* sin, T* out) const {
    const int end_of_first = first + n;
    if (n < VL) {
      for (int i = first; i < end_of_first; ++i) {
        const vf a = normed_lane(i), b = normed_lane(i + n);
        store_lane(out + i, turn(a, -b, splat(cos[i]), splat(sin[i])));
        store_lane(out + i + n, turn(b, a, splat(cos[i + n]), splat(sin[i + n])));
      }
      return;
    }
    for (int i = first; i < end_of_first; i += VL) {
      const int j = i + VL <= end_of_first ? i : end_of_first - VL;
      const vf a = normed(j), b = normed(j + n);
      store_lanes(out + j, turn(a, -b, load(cos + j), load(sin + j)));
      store_lanes(out + j + n, turn(b, a, load(cos + j + n), load(sin + j + n)));
    }
  }
  void write(const QkNormRopeParams& p, const float* cos, const float* sin, T* out) const {
    int first = 0;
    if (cos != nullptr && p.axes == 0) {
      neighbours(p.rotary, cos, sin, out);
      first = p.rotary;
    } else if (cos != nullptr) {
      for (int axis = 0; axis < p.axes; ++axis) {
        halves(first, p.width[axis] / 2, cos, sin, out);
        first += p.width[axis];
      }
    }
    plain(first, p.dim, out);
  }
};

// Loads a row and adds up its squares, or its elements.
template <class T, bool SQUARES>
float load_and_sum(const T* x, int n, float* y) {
  vf sum[4] = {};
  int i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL) {
    for (int k = 0; k < 4; ++k) {
      const vf v = load_lanes(x + i + k * VL);
      store(y + i + k * VL, v);
      sum[k] += SQUARES ? v * v : v;
    }
  }
  for (; i + VL <= n; i += VL) {
    const vf v = load_lanes(x + i);
    store(y + i, v);
    sum[0] += SQUARES ? v * v : v;
  }
  float rest = 0;
  for (; i < n; ++i) {
    y[i] = to_float(x[i]);
    rest += SQUARES ? y[i] * y[i] : y[i];
  }
  return reduce_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

float sum_of_squares(const float* y, int n, float mean) {
  vf sum{};
  int i = 0;
  for (; i + VL <= n; i += VL) {
    const vf v = load(y + i) - mean;
    sum += v * v;
  }
  float rest = 0;
  for (; i < n; ++i) rest += (y[i] - mean) * (y[i] - mean);
  return reduce_sum(sum) + rest;
}

float inverse_root(float mean_square, float eps) { return 1.0f / __builtin_sqrtf(mean_square + eps); }

int32_t entry(const vdit::TokenInts& t, int64_t b, int64_t h, int64_t n) {
  return static_cast<const int32_t*>(t.data)[b * t.batch_stride + h * t.head_stride + n * t.stride];
}

template <class T, QkRounding R>
int32_t token(const QkNormRopeParams& p, const QkStream& s, const Prepared& prepared, int64_t b, int64_t n,
              float* row) {
  const bool across = p.norm == QkNorm::rms_across && s.copy == 0;
  int32_t problems = vdit::kQkFine;
  const T* x = static_cast<const T*>(s.x.data) + b * s.x.batch_stride + n * s.x.row_stride;

  Head<T, R> head{};
  head.scale = 1.0f;
  head.weight = prepared.weight;
  head.bias = prepared.bias;
  head.end = p.norm != QkNorm::none;
  head.before = prepared.weight == nullptr || s.weight_dtype != DType::f32;
  head.relu = p.relu != 0;
  head.products = p.round_products != 0;
  if (across) {
    float sum = 0;
    for (int64_t h = 0; h < s.heads; ++h) sum += load_and_sum<T, true>(x + h * s.x.head_stride, p.dim, row + h * p.dim);
    head.scale = inverse_root(sum / (float(s.heads) * float(p.dim)), p.eps);
  }

  const float *cos = nullptr, *sin = nullptr;
  int64_t table = -1;  // offset of the row at hand
  for (int64_t h = 0; h < s.heads; ++h) {
    int64_t to = n;
    if (s.rows.data != nullptr) {
      to = entry(s.rows, b, h, n);
      if (to < 0 || to >= s.out_tokens) {
        problems |= vdit::kQkBadRow;
        continue;
      }
    }
    T* out = static_cast<T*>(s.out) + b * s.out_batch_stride + to * s.out_row_stride + h * s.out_head_stride;
    const T* from = x + h * s.x.head_stride;
    if (s.copy != 0) {
      __builtin_memmove(out, from, size_t(p.dim) * sizeof(T));
      continue;
    }

    const vdit::RopeTable& rope = s.rope;
    if (rope.cos != nullptr) {
      int64_t position = n - rope.start;
      bool turned = position >= 0 && position < rope.rows;
      if (rope.positions.data != nullptr) {
        position = entry(rope.positions, b, h, n);
        turned = position >= 0 && position < rope.rows;
        if (!turned && position != -1) problems |= vdit::kQkBadPosition;
      }
      const int64_t offset = b * rope.batch_stride + position * rope.row_stride + h * rope.head_stride;
      if (!turned) {
        cos = sin = nullptr;
        table = -1;
      } else if (offset != table) {
        cos = table_row(p, rope.cos, rope.dtype, rope.half != 0, offset, prepared.cos);
        sin = table_row(p, rope.sin, rope.dtype, rope.half != 0, offset, prepared.sin);
        table = offset;
      }
    }

    head.y = row + (across ? h * p.dim : 0);
    if (across) {
      if (prepared.weight != nullptr) head.weight = prepared.weight + h * p.dim;
      if (prepared.bias != nullptr) head.bias = prepared.bias + h * p.dim;
    } else if (p.norm == QkNorm::layer) {
      head.mean = load_and_sum<T, false>(from, p.dim, row) / float(p.dim);
      head.scale = inverse_root(sum_of_squares(row, p.dim, head.mean) / float(p.dim), p.eps);
    } else if (p.norm == QkNorm::rms) {
      head.scale = inverse_root(load_and_sum<T, true>(from, p.dim, row) / float(p.dim), p.eps);
    } else {
      widen(from, p.dim, row);
    }
    head.write(p, cos, sin, out);
  }
  return problems;
}

template <class T, QkRounding R>
int32_t run(const QkNormRopeParams& p, int64_t first, int64_t last, float* scratch) {
  Prepared prepared[3] = {};
  for (int i = 0; i < p.streams; ++i) {
    const QkStream& s = p.stream[i];
    if (s.copy != 0) continue;
    const int64_t width = (p.norm == QkNorm::rms_across ? int64_t{s.heads} : 1) * p.dim;
    Prepared& own = prepared[i];
    if (s.weight != nullptr) widen(s.weight, s.weight_dtype, width, own.weight = scratch);
    scratch += width;
    if (s.bias != nullptr) widen(s.bias, s.weight_dtype, width, own.bias = scratch);
    scratch += width;
    own.cos = scratch;
    own.sin = scratch + p.rotary;
    scratch = own.sin + p.rotary;
  }
  int32_t problems = vdit::kQkFine;
  for (int64_t item = first; item < last; ++item) {
    for (int i = 0; i < p.streams; ++i) {
      const QkStream& s = p.stream[i];
      if (item >= int64_t{p.batch} * s.tokens) continue;
      problems |= token<T, R>(p, s, prepared[i], item / s.tokens, item % s.tokens, scratch);
    }
  }
  return problems;
}

template <class T>
int32_t rounded(const QkNormRopeParams& p, int64_t first, int64_t last, float* scratch) {
  switch (p.rounding) {
    case QkRounding::fast: return run<T, QkRounding::fast>(p, first, last, scratch);
    case QkRounding::eager: return run<T, QkRounding::eager>(p, first, last, scratch);
    case QkRounding::before_weight: return run<T, QkRounding::before_weight>(p, first, last, scratch);
  }
  return 0;
}

}  // namespace

int32_t qk_norm_rope(const QkNormRopeParams& p, int64_t first, int64_t last, float* scratch) {
  switch (p.dtype) {
    case DType::f32: return run<float, QkRounding::fast>(p, first, last, scratch);
    case DType::f16: return rounded<f16>(p, first, last, scratch);
    case DType::bf16: return rounded<bf16>(p, first, last, scratch);
  }
  return 0;
}

}  // namespace VDIT_NS

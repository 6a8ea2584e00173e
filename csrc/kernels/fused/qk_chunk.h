// Eight neighbouring channels of one head in fp32 registers: what the two kernels of qk_norm_rope do with them.
#pragma once
#include <cmath>

#include "arch/arch.h"
#include "kernels/fused/qk_norm_rope.h"

namespace vdit::gpu {
namespace qk {

constexpr int kChunk = 8;

template <class E>
struct Element {
  static constexpr int kBytes = 2;
  VD_STATIC_METHOD float widen(uint32_t bits) {
    float lo, hi;
    arch::unpack<E>(bits, lo, hi);
    return lo;
  }
  VD_STATIC_METHOD float round(float x) { return widen(arch::pack<E>(x, x)); }
};
template <>
struct Element<float> {
  static constexpr int kBytes = 4;
  VD_STATIC_METHOD float round(float x) { return x; }
};

VD_DEV void widen8(const uint4& a, const uint4& b, float (&v)[kChunk]) {
  const uint32_t bits[kChunk] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  VD_UNROLL for (int e = 0; e < kChunk; ++e) v[e] = arch::as_float(bits[e]);
}

// Elements [0, valid) at `p`, the others 0. Vector: valid is 0 or 8, and `p` a multiple of 16 bytes.
template <class E, bool Vector>
VD_DEV void load8(const char* p, int valid, float (&v)[kChunk]) {
  VD_UNROLL for (int e = 0; e < kChunk; ++e) v[e] = 0.0f;
  if (valid <= 0) return;
  constexpr int kBytes = Element<E>::kBytes;
  if constexpr (Vector && kBytes == 4) {
    widen8(arch::ldg128(p), arch::ldg128(p + 16), v);
  } else if constexpr (Vector) {
    const uint4 bits = arch::ldg128(p);
    arch::unpack<E>(bits.x, v[0], v[1]);
    arch::unpack<E>(bits.y, v[2], v[3]);
    arch::unpack<E>(bits.z, v[4], v[5]);
    arch::unpack<E>(bits.w, v[6], v[7]);
  } else {
    VD_UNROLL for (int e = 0; e < kChunk; ++e) {
      if (e >= valid) continue;
      if constexpr (kBytes == 4)
        v[e] = reinterpret_cast<const float*>(p)[e];
      else
        v[e] = Element<E>::widen(reinterpret_cast<const uint16_t*>(p)[e]);
    }
  }
}
template <class E, bool Vector>
VD_DEV void store8(char* p, int valid, const float (&v)[kChunk]) {
  if (valid <= 0) return;
  constexpr int kBytes = Element<E>::kBytes;
  if constexpr (Vector && kBytes == 4) {
    arch::stg128(p, {arch::as_uint(v[0]), arch::as_uint(v[1]), arch::as_uint(v[2]), arch::as_uint(v[3])});
    arch::stg128(p + 16, {arch::as_uint(v[4]), arch::as_uint(v[5]), arch::as_uint(v[6]), arch::as_uint(v[7])});
  } else if constexpr (Vector) {
    arch::stg128(p, {arch::pack<E>(v[0], v[1]), arch::pack<E>(v[2], v[3]), arch::pack<E>(v[4], v[5]),
                     arch::pack<E>(v[6], v[7])});
  } else {
    VD_UNROLL for (int e = 0; e < kChunk; ++e) {
      if (e >= valid) continue;
      if constexpr (kBytes == 4)
        reinterpret_cast<float*>(p)[e] = v[e];
      else
        reinterpret_cast<uint16_t*>(p)[e] = uint16_t(arch::pack<E>(v[e], v[e]));
    }
  }
}

// The same for tensors with a dtype of their own: weights and tables.
template <bool Vector>
VD_DEV void load8(const void* base, DType type, int64_t offset, int valid, float (&v)[kChunk]) {
  const char* p = static_cast<const char*>(base) + offset * (type == DType::f32 ? 4 : 2);
  switch (type) {
    case DType::f32: return load8<float, Vector>(p, valid, v);
    case DType::f16: return load8<arch::F16, Vector>(p, valid, v);
    case DType::bf16: return load8<arch::BF16, Vector>(p, valid, v);
  }
}
VD_DEV float load1(const void* base, DType type, int64_t offset) {
  if (type == DType::f32) return static_cast<const float*>(base)[offset];
  const uint32_t bits = static_cast<const uint16_t*>(base)[offset];
  return type == DType::f16 ? Element<arch::F16>::widen(bits) : Element<arch::BF16>::widen(bits);
}

// Where a rotated channel finds its partner.
struct Place {
  int partner;
  int entry;  // in a table with one value per pair
  bool first;
};
VD_DEV Place place(const QkNormRopeParams& p, int channel) {
  if (p.axes == 0) return {channel ^ 1, channel / 2, channel % 2 == 0};
  int start = 0, width = p.width[0];
  VD_UNROLL for (int axis = 1; axis < kMaxRopeAxes; ++axis) {
    if (axis >= p.axes || channel < start + width) continue;
    start += width;
    width = p.width[axis];
  }
  const int half = width / 2, inside = channel - start;
  const bool first = inside < half;
  return {first ? channel + half : channel - half, start / 2 + (first ? inside : inside - half), first};
}

// Angles of one chunk; sin has the sign with which the partner enters.
struct Angles {
  float cos[kChunk], sin[kChunk];
};
template <bool Vector>
VD_DEV void load_angles(const QkNormRopeParams& p, const RopeTable& rope, int64_t offset, int column, Angles& a) {
  // Chunks of whole halves: width % 16 == 0, which the host has seen to for Vector.
  if (Vector && rope.half == 0 && column + kChunk <= p.rotary) {
    load8<true>(rope.cos, rope.dtype, offset + column, kChunk, a.cos);
    load8<true>(rope.sin, rope.dtype, offset + column, kChunk, a.sin);
  } else if (Vector && p.axes != 0 && column + kChunk <= p.rotary) {
    const int entry = place(p, column).entry;
    load8<true>(rope.cos, rope.dtype, offset + entry, kChunk, a.cos);
    load8<true>(rope.sin, rope.dtype, offset + entry, kChunk, a.sin);
  } else {
    VD_UNROLL for (int e = 0; e < kChunk; ++e) {
      const int channel = column + e;
      a.cos[e] = 1.0f;
      a.sin[e] = 0.0f;
      if (channel >= p.rotary) continue;
      if (p.axes == 0 && rope.half != 0 && e % 2 == 1) {  // the pair's value is here already
        a.cos[e] = a.cos[e - 1];
        a.sin[e] = a.sin[e - 1];
        continue;
      }
      const int64_t at = offset + (rope.half != 0 ? place(p, channel).entry : channel);
      a.cos[e] = load1(rope.cos, rope.dtype, at);
      a.sin[e] = load1(rope.sin, rope.dtype, at);
    }
  }
  if (p.axes == 0) {
    VD_UNROLL for (int e = 0; e < kChunk; e += 2) a.sin[e] = -a.sin[e];
  } else if (Vector) {
    const bool first = place(p, column).first;
    VD_UNROLL for (int e = 0; e < kChunk; ++e) a.sin[e] = first ? -a.sin[e] : a.sin[e];
  } else {
    VD_UNROLL for (int e = 0; e < kChunk; ++e) a.sin[e] = place(p, column + e).first ? -a.sin[e] : a.sin[e];
  }
}

// The row of the table for this token, as an offset in elements; -1: not rotated.
VD_DEV int32_t entry_of(const TokenInts& t, int64_t b, int64_t h, int64_t n) {
  return static_cast<const int32_t*>(t.data)[b * t.batch_stride + h * t.head_stride + n * t.stride];
}
VD_DEV int64_t angle_offset(const RopeTable& rope, int64_t b, int64_t h, int64_t n) {
  if (rope.cos == nullptr) return -1;
  const int64_t row = rope.positions.data != nullptr ? entry_of(rope.positions, b, h, n) : n - rope.start;
  if (row < 0 || row >= rope.rows) return -1;
  return b * rope.batch_stride + row * rope.row_stride + h * rope.head_stride;
}

// Where the head of a token goes; null: nowhere.
template <class E>
VD_DEV char* destination(const QkStream& s, int64_t b, int64_t h, int64_t n) {
  const int64_t row = s.rows.data != nullptr ? entry_of(s.rows, b, h, n) : n;
  if (row < 0 || row >= s.out_tokens) return nullptr;
  return static_cast<char*>(s.out) +
         (b * s.out_batch_stride + row * s.out_row_stride + h * s.out_head_stride) * Element<E>::kBytes;
}

// v = norm(v) * w + b with the rounding points asked for.
template <class E>
VD_DEV void finish(const QkNormRopeParams& p, const QkStream& s, float mean, float scale, const float (&w)[kChunk],
                   const float (&b)[kChunk], float (&v)[kChunk]) {
  const bool before = p.rounding == QkRounding::before_weight && (s.weight == nullptr || s.weight_dtype != DType::f32);
  const bool end = p.rounding == QkRounding::eager && p.norm != QkNorm::none;
  VD_UNROLL for (int e = 0; e < kChunk; ++e) {
    float x = (v[e] - mean) * scale;
    if (before) x = Element<E>::round(x);
    if (s.weight != nullptr) {
      x = arch::mul_rn(x, w[e]);
      if (before) x = Element<E>::round(x);
    }
    if (s.bias != nullptr) {
      x += b[e];
      if (before) x = Element<E>::round(x);
    }
    if (end) x = Element<E>::round(x);
    v[e] = p.relu != 0 && x < 0.0f ? 0.0f : x;
  }
}

// v = v * cos + other * sin, each product rounded by itself as eager's are.
template <class E>
VD_DEV void turn(const QkNormRopeParams& p, int column, const Angles& a, const float (&other)[kChunk],
                 float (&v)[kChunk]) {
  const bool products = p.rounding != QkRounding::fast && p.round_products != 0;
  float turned[kChunk];
  VD_UNROLL for (int e = 0; e < kChunk; ++e) {
    float x = arch::mul_rn(v[e], a.cos[e]), z = arch::mul_rn(other[e], a.sin[e]);
    if (products) {
      x = Element<E>::round(x);
      z = Element<E>::round(z);
    }
    turned[e] = column + e < p.rotary ? x + z : v[e];
  }
  VD_UNROLL for (int e = 0; e < kChunk; ++e) v[e] = turned[e];
}
VD_DEV void neighbours(const float (&v)[kChunk], float (&other)[kChunk]) {
  VD_UNROLL for (int e = 0; e < kChunk; ++e) other[e] = v[e ^ 1];
}

// Rows in shared memory: the first four channels of all chunks, then the other four, so that neighbouring lanes touch
// neighbouring 16 bytes. `row`: address of the first, `chunks`: chunks in it.
VD_DEV void put_chunk(uint32_t row, int chunks, int chunk, const float (&v)[kChunk]) {
  arch::sts128(row + chunk * 16, {arch::as_uint(v[0]), arch::as_uint(v[1]), arch::as_uint(v[2]), arch::as_uint(v[3])});
  arch::sts128(row + (chunks + chunk) * 16,
               {arch::as_uint(v[4]), arch::as_uint(v[5]), arch::as_uint(v[6]), arch::as_uint(v[7])});
}
// The partners of the chunk at `column` of the head whose first chunk is `first`.
template <bool Vector>
VD_DEV void get_partners(const QkNormRopeParams& p, uint32_t row, int chunks, int first, int column,
                         float (&other)[kChunk]) {
  if (Vector && column + kChunk <= p.rotary) {
    const int chunk = first + place(p, column).partner / kChunk;
    widen8(arch::lds128(row + chunk * 16), arch::lds128(row + (chunks + chunk) * 16), other);
    return;
  }
  VD_UNROLL for (int e = 0; e < kChunk; ++e) {
    other[e] = 0.0f;
    if (column + e >= p.rotary) continue;
    const int channel = place(p, column + e).partner;
    const int chunk = first + channel / kChunk + (channel % kChunk >= 4 ? chunks : 0);
    other[e] = arch::as_float(arch::lds32(row + chunk * 16 + channel % 4 * 4));
  }
}

}  // namespace qk
}  // namespace vdit::gpu

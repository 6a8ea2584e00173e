// Short sequences on a CPU: all of a sequence lies in L1 and L2, keys as transposed panels, the rest as padded rows.
#include "kernels/short/short_attention.h"

#include "cpu/isa/panel.h"

namespace VDIT_NS {
namespace {

using Params = vdit::ShortAttentionParams;
using vdit::ShortView;

constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kTileRows = 60;  // queries at a time; a multiple of MR

int padded(int n) { return (n + NR - 1) / NR * NR; }

struct Sequence {
  int64_t batch, place, head;
};

template <class T>
const T* row(const ShortView& x, const Sequence& at, int64_t i) {
  return static_cast<const T*>(x.data) + at.batch * x.stride[0] + i * x.stride[1] + at.place * x.stride[2] +
         at.head * x.stride[3];
}

// A row to fp32; the padding up to `width` becomes zero.
template <class T>
void load_row(const T* from, int64_t stride, int n, int width, float* to) {
  if (stride == 1) {
    int d = 0;
#if defined(__F16C__)
    if constexpr (sizeof(T) == 2 && __is_same(T, f16)) {
      for (; d + 8 <= n; d += 8)
        _mm256_storeu_ps(to + d, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + d))));
    }
#endif
    for (; d < n; ++d) to[d] = to_float(from[d]);
  } else {
    for (int d = 0; d < n; ++d) to[d] = to_float(from[d * stride]);
  }
  for (int d = n; d < width; ++d) to[d] = 0.0f;
}

template <class T>
void store_row(const float* from, int n, int64_t stride, T* to) {
  if (stride == 1) {
    int d = 0;
#if defined(__F16C__)
    if constexpr (sizeof(T) == 2 && __is_same(T, f16)) {
      for (; d + 8 <= n; d += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + d),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + d), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; d < n; ++d) from_float(from[d], to[d]);
  } else {
    for (int d = 0; d < n; ++d) from_float(from[d], to[d * stride]);
  }
}

// How many keys query i of this sequence reads, of `keys` that exist.
int keys_of_row(const Params& p, int i, int keys) {
  if (p.causal == 0) return keys;
  const int64_t end = int64_t(i) + 1 + p.lk - p.lq;
  return end < 0 ? 0 : end < keys ? int(end) : keys;
}

// Scores of one row to weights that sum to 1; columns from `keys` on get 0.
void softmax_row(float* s, int keys, int columns, float scale) {
  vi lane;
  for (int i = 0; i < VL; ++i) lane[i] = i;
  vf top = splat(-kInf);
  for (int c = 0; c < columns; c += VL) {
    vf x = load(s + c) * scale;
    if (c + VL > keys) x = lane < splat_i(keys - c) ? x : splat(-kInf);
    store(s + c, x);
    top = max_or_second(x, top);  // a NaN may get lost here; the sum brings it back
  }
  float highest = reduce_max(top);
  if (highest == -kInf) highest = 0.0f;
  vf sum{};
  for (int c = 0; c < columns; c += VL) {
    const vf e = exp2_nonpositive(load(s + c) - highest);
    store(s + c, e);
    sum += e;
  }
  const float total = reduce_sum(sum);
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  for (int c = 0; c < columns; c += VL) store(s + c, load(s + c) * factor);
}

bool all_finite(const float* x, int64_t n) {  // n: a multiple of VL
  vf sum{};
  for (int64_t i = 0; i < n; i += VL) sum += load(x + i) * 0.0f;
  return reduce_sum(sum) == 0.0f;
}

struct Scratch {
  float *panels, *values, *queries, *scores, *out;
  Scratch(const Params& p, float* at) {
    const int64_t width = padded(p.dim), keys = padded(p.lk);
    panels = at;                        // [keys / NR][dim][NR]
    values = panels + keys * width;     // [lk][width]
    queries = values + keys * width;    // [kTileRows][width]
    out = queries + kTileRows * width;  // [kTileRows][width]
    scores = out + kTileRows * width;   // [kTileRows][keys]
  }
};

// One key: every row that reads it gets its value, bit for bit.
template <class T>
void one_key(const Params& p, const Sequence& at, int keys) {
  const T* from = row<T>(p.v, at, 0);
  const T zero{};
  for (int i = 0; i < p.lq; ++i) {
    T* to = const_cast<T*>(row<T>(p.out, at, i));
    const bool reads = keys_of_row(p, i, keys) > 0;
    for (int d = 0; d < p.dim; ++d) to[d * p.out.stride[4]] = reads ? from[d * p.v.stride[4]] : zero;
  }
}

template <class T>
void sequence(const Params& p, const Sequence& at, int keys, const Scratch& m) {
  if (p.lk == 1) return one_key<T>(p, at, keys);
  const int width = padded(p.dim), columns = padded(keys);
  const float scale = p.scale * kLog2e;
  for (int j = 0; j < keys; ++j)
    load_row(row<T>(p.v, at, j), p.v.stride[4], p.dim, width, m.values + int64_t(j) * width);
  for (int first = 0; first < columns; first += NR) {
    const void* rows[NR];
    for (int j = 0; j < NR; ++j) rows[j] = first + j < keys ? row<T>(p.k, at, first + j) : nullptr;
    pack_rows<T>(rows, p.k.stride[4], p.dim, m.panels + int64_t(first) * p.dim);
  }
  // 0 * NaN is NaN: where rows read different keys, a value that is not finite must be kept from those that do not.
  const bool row_by_row = p.causal != 0 && !all_finite(m.values, int64_t(keys) * width);
  for (int first = 0; first < p.lq; first += kTileRows) {
    const int n = p.lq - first < kTileRows ? p.lq - first : kTileRows;
    for (int i = 0; i < n; ++i)
      load_row(row<T>(p.q, at, first + i), p.q.stride[4], p.dim, width, m.queries + int64_t(i) * width);
    gemm<false>(n, columns, p.dim, m.queries, width, m.panels, NR, int64_t(p.dim) * NR, m.scores, columns);
    for (int i = 0; i < n; ++i)
      softmax_row(m.scores + int64_t(i) * columns, keys_of_row(p, first + i, keys), columns, scale);
    if (row_by_row) {
      for (int i = 0; i < n; ++i)
        gemm<false>(1, width, keys_of_row(p, first + i, keys), m.scores + int64_t(i) * columns, columns, m.values,
                    width, NR, m.out + int64_t(i) * width, width);
    } else {
      gemm<false>(n, width, keys, m.scores, columns, m.values, width, NR, m.out, width);
    }
    for (int i = 0; i < n; ++i)
      store_row(m.out + int64_t(i) * width, p.dim, p.out.stride[4], const_cast<T*>(row<T>(p.out, at, first + i)));
  }
}

template <class T>
void sequences(const Params& p, int64_t first, int64_t last, float* scratch) {
  const Scratch memory(p, scratch);
  for (int64_t n = first; n < last; ++n) {
    const Sequence at{n / p.heads / p.places, n / p.heads % p.places, n % p.heads};
    int64_t keys = p.lk;
    if (p.kv_len != nullptr) {
      const int64_t entry = at.batch * p.kv_len_stride;
      const int64_t valid = p.kv_len_bytes == 8 ? static_cast<const int64_t*>(p.kv_len)[entry]
                                                : static_cast<const int32_t*>(p.kv_len)[entry];
      keys = valid < 0 ? 0 : valid < keys ? valid : keys;
    }
    sequence<T>(p, at, int(keys), memory);
  }
}

}  // namespace

int64_t short_attention_scratch(const Params& p) {
  const int64_t width = padded(p.dim), keys = padded(p.lk);
  return 2 * keys * width + kTileRows * (2 * width + keys);
}

void short_attention(const Params& p, int64_t first, int64_t last, float* scratch) {
  switch (p.dtype) {
    case vdit::DType::f32: return sequences<float>(p, first, last, scratch);
    case vdit::DType::f16: return sequences<f16>(p, first, last, scratch);
    case vdit::DType::bf16: return sequences<bf16>(p, first, last, scratch);
  }
}

}  // namespace VDIT_NS

// Sum of the rows of one part of a block: the tokens are listed once, then columns are summed in registers, 64 at a
// time.
#include "cpu/block_mean_part.h"
#include "cpu/isa/float16.h"
#include "cpu/isa/vec.h"

namespace VDIT_NS {
namespace {

using vdit::BlockMeanParams;
using vdit::BlockMeanWork;
using vdit::DType;

constexpr int kAhead = 8;  // rows between the prefetch and the addition

static inline vf load_floats(const float* p) { return load(p); }
static inline vf load_floats(const bf16* p) {
  typedef uint16_t vh __attribute__((vector_size(VL * 2), aligned(2), may_alias));
  return (vf)(__builtin_convertvector(*reinterpret_cast<const vh*>(p), vi) << 16);
}
static inline vf load_floats(const f16* p) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif VDIT_VL == 8 && defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int i = 0; i < VL; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Columns [0, V * VL) of the rows at x + offset.
template <int V, class T>
inline void sum_columns(const T* x, const int64_t* offset, int n, float* sum) {
  vf acc[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) acc[v] = vf{};
  for (int i = 0; i < n; ++i) {
    const T* row = x + offset[i];
    const T* ahead = x + offset[i + kAhead < n ? i + kAhead : n - 1];
    for (int byte = 0; byte < V * VL * int(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(ahead) + byte);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[v] += load_floats(row + v * VL);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store(sum + v * VL, acc[v]);
}

template <class T>
void sum_rows(const T* x, const int64_t* offset, int n, int dim, float* sum) {
  int d = 0;
  for (; d + 64 <= dim; d += 64) sum_columns<64 / VL>(x + d, offset, n, sum + d);
  for (; d + VL <= dim; d += VL) sum_columns<1>(x + d, offset, n, sum + d);
  for (; d < dim; ++d) {
    float s = 0.f;
    for (int i = 0; i < n; ++i) s += to_float(x[offset[i] + d]);
    sum[d] = s;
  }
}

int64_t entry(const vdit::TokenInts& t, int64_t at) {
  return t.bytes == 8 ? static_cast<const int64_t*>(t.data)[at] : static_cast<const int32_t*>(t.data)[at];
}

}  // namespace

bool block_mean_part(const BlockMeanParams& p, const BlockMeanWork& work) {
  const int64_t valid = p.kv_len.data != nullptr ? entry(p.kv_len, work.batch * p.kv_len.batch_stride) : p.tokens;
  const int32_t* order = static_cast<const int32_t*>(p.order.data);
  if (order != nullptr) order += work.batch * p.order.batch_stride + work.head * p.order.head_stride;
  const int64_t base = work.batch * p.x.batch_stride + work.head * p.x.head_stride;
  int64_t offset[vdit::kBlockMeanPart];
  int n = 0;
  bool in_range = true;
  for (int64_t i = work.first; i < work.first + work.count; ++i) {
    const int64_t token = order != nullptr ? order[i * p.order.stride] : i;
    const bool exists = token >= 0 && token < p.tokens;
    in_range &= exists;
    if (exists && token < valid) offset[n++] = base + token * p.x.row_stride;
  }
  switch (p.dtype) {
    case DType::f32: sum_rows(static_cast<const float*>(p.x.data), offset, n, p.dim, work.sum); break;
    case DType::f16: sum_rows(static_cast<const f16*>(p.x.data), offset, n, p.dim, work.sum); break;
    case DType::bf16: sum_rows(static_cast<const bf16*>(p.x.data), offset, n, p.dim, work.sum); break;
  }
  *work.counted = n;
  if (work.whole && n > 1)
    for (int d = 0; d < p.dim; ++d) work.sum[d] /= float(n);
  return in_range;
}

}  // namespace VDIT_NS

// Sum of the rows of one part of a block, in registers, 64 columns at a time. With an order the rows are listed first.
#include "cpu/block_mean_part.h"
#include "cpu/isa/lanes16.h"

namespace VDIT_NS {
namespace {

using vdit::BlockMeanParams;
using vdit::BlockMeanWork;
using vdit::DType;

constexpr int kAhead = 8;  // rows between the prefetch and the addition

// Where row i of a part begins. Listed rows are scattered, so they are fetched ahead: only the list tells where they
// are.
struct Listed {
  static constexpr bool kScattered = true;
  const int64_t* offset;
  int64_t operator()(int i) const { return offset[i]; }
};
struct Strided {
  static constexpr bool kScattered = false;
  int64_t first, stride;
  int64_t operator()(int i) const { return first + i * stride; }
};

// Columns [0, V * VL) of n rows.
template <int V, class T, class Rows>
inline void sum_columns(const T* x, Rows rows, int n, float* sum) {
  vf acc[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) acc[v] = vf{};
  for (int i = 0; i < n; ++i) {
    const T* row = x + rows(i);
    if (Rows::kScattered) {
      const T* ahead = x + rows(i + kAhead < n ? i + kAhead : n - 1);
      for (int byte = 0; byte < V * VL * int(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(ahead) + byte);
    }
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[v] += load_lanes(row + v * VL);
  }
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) store(sum + v * VL, acc[v]);
}

template <class T, class Rows>
void sum_rows(const BlockMeanParams& p, Rows rows, int n, float* sum) {
  const T* x = static_cast<const T*>(p.x.data);
  int d = 0;
  for (; d + 64 <= p.dim; d += 64) sum_columns<64 / VL>(x + d, rows, n, sum + d);
  for (; d + VL <= p.dim; d += VL) sum_columns<1>(x + d, rows, n, sum + d);
  for (; d < p.dim; ++d) {
    float s = 0.f;
    for (int i = 0; i < n; ++i) s += to_float(x[rows(i) + d]);
    sum[d] = s;
  }
}

template <class Rows>
void sum_rows(const BlockMeanParams& p, Rows rows, int n, float* sum) {
  switch (p.dtype) {
    case DType::f32: return sum_rows<float>(p, rows, n, sum);
    case DType::f16: return sum_rows<f16>(p, rows, n, sum);
    case DType::bf16: return sum_rows<bf16>(p, rows, n, sum);
  }
}

int64_t entry(const vdit::TokenInts& t, int64_t at) {
  return t.bytes == 8 ? static_cast<const int64_t*>(t.data)[at] : static_cast<const int32_t*>(t.data)[at];
}

}  // namespace

bool block_mean_part(const BlockMeanParams& p, const BlockMeanWork& work) {
  const int64_t limit = p.kv_len.data != nullptr ? entry(p.kv_len, work.batch * p.kv_len.batch_stride) : p.tokens;
  const int64_t base = work.batch * p.x.batch_stride + work.head * p.x.head_stride;
  int n = 0;
  bool in_range = true;
  if (p.order.data == nullptr) {
    const int64_t rest = limit - work.first;
    n = rest < work.count ? (rest > 0 ? int(rest) : 0) : work.count;
    sum_rows(p, Strided{base + work.first * p.x.row_stride, p.x.row_stride}, n, work.sum);
  } else {
    const int32_t* order =
        static_cast<const int32_t*>(p.order.data) + work.batch * p.order.batch_stride + work.head * p.order.head_stride;
    int64_t offset[vdit::kBlockMeanPart];
    for (int64_t i = work.first; i < work.first + work.count; ++i) {
      const int64_t token = order[i * p.order.stride];
      const bool exists = token >= 0 && token < p.tokens;
      in_range &= exists;
      if (exists && token < limit) offset[n++] = base + token * p.x.row_stride;
    }
    sum_rows(p, Listed{offset}, n, work.sum);
  }
  *work.counted = n;
  if (work.whole && n > 1)
    for (int d = 0; d < p.dim; ++d) work.sum[d] /= float(n);
  return in_range;
}

}  // namespace VDIT_NS

// Rows of tensors in steps of vectors, and rows of the tables of the adaptive norms as fp32 rows.
#pragma once
#include "cpu/isa/lanes16.h"
#include "kernels/fused/adaln.h"

namespace VDIT_NS {

// Lanes of a tensor's row that a step works on: all, or the first n at the end of the row. Scratch rows are padded.
struct All {};
struct Some {
  int n;
};
template <class T>
static inline vf get(const T* p, All) {
  return load_lanes(p);
}
template <class T>
static inline vf get(const T* p, Some s) {
  return load_some(p, s.n);
}
template <class T>
static inline void put(T* p, vf v, All) {
  store_lanes(p, v);
}
template <class T>
static inline void put(T* p, vf v, Some s) {
  store_some(p, v, s.n);
}
static inline vf only(vf v, All) { return v; }
static inline vf only(vf v, Some s) {
  for (int i = s.n; i < VL; ++i) v[i] = 0.f;
  return v;
}

// f(first column, All or Some, accumulator 0 ... 3)
template <class F>
static inline void each(int dim, F f) {
  int i = 0;
  for (; i + 4 * VL <= dim; i += 4 * VL) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) f(i + k * VL, All{}, k);
  }
  for (; i + VL <= dim; i += VL) f(i, All{}, 0);
  if (i < dim) f(i, Some{dim - i}, 0);
}

// Calls f with a typed pointer.
template <class H, class F>
static inline void typed(const void* p, vdit::DType dtype, F f) {
  if (dtype == vdit::DType::f32)
    f(static_cast<const float*>(p));
  else
    f(static_cast<const H*>(p));
}

template <class H>
static inline void convert(const void* src, vdit::DType dtype, int dim, float* dst) {
  typed<H>(src, dtype, [=](auto* s) { each(dim, [=](int i, auto part, int) { store(dst + i, get(s + i, part)); }); });
}

// The row of a token in a table; null without a table. Indices lie inside their tables.
template <class Params>
static inline const void* row_of(const Params& p, const vdit::AdaLNTable& t, int64_t b, int64_t n) {
  if (t.data == nullptr) return nullptr;
  const int64_t row = t.rows == 1 ? 0 : p.index == nullptr ? n : p.index[b * p.index_batch_stride + n * p.index_stride];
  const int64_t bytes = p.row_dtype == vdit::DType::f32 ? 4 : 2;
  return static_cast<const char*>(t.data) + (b * t.batch_stride + row * t.row_stride) * bytes;
}

// dst = finish(row + base)
template <class H, class Params, class F>
static inline void complete_row(const Params& p, const vdit::AdaLNTable& t, const void* row, float* dst, F finish) {
  convert<H>(row, p.row_dtype, p.dim, dst);
  if (t.base != nullptr)
    typed<H>(t.base, p.base_dtype, [&](auto* base) {
      each(p.dim, [&](int i, auto part, int) {
        const vf v = load(dst + i) + get(base + i, part);
        store(dst + i, t.round ? round_lanes<H>(v) : v);
      });
    });
  each(p.dim, [&](int i, auto, int) { store(dst + i, finish(load(dst + i))); });
}

}  // namespace VDIT_NS

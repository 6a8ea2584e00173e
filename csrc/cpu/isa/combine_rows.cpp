// Rows added up by weight, on vectors: a few vectors of the result stay in registers while the operands pass by.
#include <string.h>

#include "cpu/isa/lanes16.h"
#include "kernels/fused/combine_rows.h"

namespace VDIT_NS {
namespace {

using vdit::CombineRowsParams;
using vdit::kCombineMaxSlots;

// The operands of one row of the result.
template <class T>
struct Row {
  const T* source[kCombineMaxSlots];
  float weight[kCombineMaxSlots];
  int sources = 0;
  const T *base, *residual, *gate;

  Row(const CombineRowsParams& p, int64_t n)
      : base(row_of(p.base, n * p.base_stride)),
        residual(row_of(p.residual, n * p.residual_stride)),
        gate(row_of(p.gate, n / p.rows_per_gate * p.gate_stride)) {
    for (int j = 0; j < p.slots_per_row; ++j) {
      const int64_t at = n * p.slots_per_row + j, slot = p.slots[at];
      if (slot < 0 || slot >= p.sources) continue;
      source[sources] = static_cast<const T*>(p.source) + slot * p.source_stride;
      weight[sources++] = p.weights != nullptr ? p.weights[at] : 1.f;
    }
  }
  static const T* row_of(const void* data, int64_t offset) {
    return data == nullptr ? nullptr : static_cast<const T*>(data) + offset;
  }

  // kVectors whole vectors from `column` on, or the n < VL elements there.
  template <int kVectors>
  void part(int column, int n, T* out) const {
    const bool whole = n == kVectors * VL;
    const auto get = [&](const T* p, int u) {
      return whole ? load_lanes(p + column + u * VL) : load_some(p + column, n);
    };
    vf sum[kVectors];
    for (int u = 0; u < kVectors; ++u) sum[u] = base != nullptr ? get(base, u) : vf{};
    for (int j = 0; j < sources; ++j) {
      const vf w = splat(weight[j]);
      for (int u = 0; u < kVectors; ++u) sum[u] += w * get(source[j], u);
    }
    for (int u = 0; u < kVectors; ++u) {
      if (gate != nullptr) sum[u] *= get(gate, u);
      if (residual != nullptr) sum[u] += get(residual, u);
      if (whole)
        store_lanes(out + column + u * VL, sum[u]);
      else
        store_some(out + column, sum[u], n);
    }
  }
};

template <class T>
void run(const CombineRowsParams& p, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    const Row<T> row(p, n);
    T* out = static_cast<T*>(p.out) + n * p.dim;
    if (row.sources == 0 && row.base == nullptr) {
      if (row.residual != nullptr)
        memcpy(out, row.residual, size_t(p.dim) * sizeof(T));
      else
        memset(out, 0, size_t(p.dim) * sizeof(T));
      continue;
    }
    int column = 0;
    for (; column + 4 * VL <= p.dim; column += 4 * VL) row.template part<4>(column, 4 * VL, out);
    for (; column + VL <= p.dim; column += VL) row.template part<1>(column, VL, out);
    if (column < p.dim) row.template part<1>(column, p.dim - column, out);
  }
}

}  // namespace

void combine_rows(const CombineRowsParams& p, int64_t first, int64_t last) {
  switch (p.dtype) {
    case vdit::DType::f32: return run<float>(p, first, last);
    case vdit::DType::f16: return run<f16>(p, first, last);
    case vdit::DType::bf16: return run<bf16>(p, first, last);
  }
}

}  // namespace VDIT_NS

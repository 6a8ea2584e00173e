#include <math.h>

#include "cpu/isa/float16.h"
#include "kernels/merge.h"

namespace VDIT_NS {
namespace {

constexpr int kChunk = 256;  // accumulators on the stack

// Weights of one row's parts; returns the row's lse.
float row_weights(const vdit::MergeParams& p, int64_t b, int64_t l, int64_t h, float* weight) {
  float top = -INFINITY;
  bool any_nan = false;
  for (int i = 0; i < p.parts; ++i) {
    const vdit::MergePart& part = p.part[i];
    const float x = part.lse[b * part.lse_stride[0] + h * part.lse_stride[1] + l * part.lse_stride[2]];
    weight[i] = x;
    any_nan |= x != x;
    top = x > top ? x : top;
  }
  if (top == -INFINITY && !any_nan) {
    for (int i = 0; i < p.parts; ++i) weight[i] = 0.0f;
    return top;
  }
  float sum = 0.0f;
  for (int i = 0; i < p.parts; ++i) {
    weight[i] = expf(weight[i] - top);
    sum += weight[i];
  }
  for (int i = 0; i < p.parts; ++i) weight[i] /= sum;
  if (any_nan) return NAN;
  return top == INFINITY ? top : top + logf(sum);
}

template <class T>
void rows(const vdit::MergeParams& p, int64_t first, int64_t last) {
  float weight[vdit::kMergeMaxParts];
  float sum[kChunk];
  for (int64_t row = first; row < last; ++row) {
    const int64_t h = row % p.heads;
    const int64_t l = row / p.heads % p.length;
    const int64_t b = row / p.heads / p.length;
    const float lse = row_weights(p, b, l, h, weight);
    p.lse[(b * p.heads + h) * p.length + l] = lse;
    T* out = static_cast<T*>(p.out) + row * p.dim;
    for (int64_t base = 0; base < p.dim; base += kChunk) {
      const int n = int(p.dim - base < kChunk ? p.dim - base : kChunk);
      for (int d = 0; d < n; ++d) sum[d] = 0.0f;
      // An empty row is exactly 0 even where its parts hold NaN: they are not read.
      for (int i = 0; i < p.parts && lse != -INFINITY; ++i) {
        const vdit::MergePart& part = p.part[i];
        // A part that saw no key here may hold anything.
        if (part.lse[b * part.lse_stride[0] + h * part.lse_stride[1] + l * part.lse_stride[2]] == -INFINITY) continue;
        const T* x = static_cast<const T*>(part.out) + b * part.out_stride[0] + l * part.out_stride[1] +
                     h * part.out_stride[2] + base * part.out_stride[3];
        const float w = weight[i];
        if (part.out_stride[3] == 1) {
          for (int d = 0; d < n; ++d) sum[d] += w * to_float(x[d]);
        } else {
          for (int d = 0; d < n; ++d) sum[d] += w * to_float(x[d * part.out_stride[3]]);
        }
      }
      for (int d = 0; d < n; ++d) from_float(sum[d], out[base + d]);
    }
  }
}

}  // namespace

void merge_rows(const vdit::MergeParams& p, int64_t first, int64_t last) {
  switch (p.dtype) {
    case vdit::DType::f32: return rows<float>(p, first, last);
    case vdit::DType::f16: return rows<f16>(p, first, last);
    case vdit::DType::bf16: return rows<bf16>(p, first, last);
  }
}

}  // namespace VDIT_NS

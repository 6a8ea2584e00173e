// Adaptive norms of transformer blocks, one pass over the rows of [B, N, D]:
//
//   x_new = x + act(gate) * post(y)                 y null: x_new = x and is not written
//   h     = norm(x_new) * (1 + scale) + shift       h null: not computed
//
// gate, scale and shift are rows of tables [Bt, R, D]; `index` maps tokens to rows. A table may have a base [D] that is
// added to each of its rows. Absent parts are skipped: no gate is gate 1, no scale is scale 0, no shift is shift 0.
// Arithmetic is fp32; the round_* flags say which intermediate results are rounded to the 16-bit dtype of the call.
#pragma once
#include "kernels/types.h"

namespace vdit {

constexpr int kAdaLNMaxDim = 16384;

enum class NormKind : int32_t { none = 0, rms = 1, layer = 2 };

struct AdaLNRows {
  const void* data;  // [B, N, D], last dimension contiguous
  int64_t batch_stride, token_stride;
  DType dtype;
};

struct AdaLNTable {
  const void* data;  // [Bt, R, D], last dimension contiguous; null: absent
  const void* base;  // [D] or null
  int64_t batch_stride, row_stride;
  int32_t rows;   // 1: one row for all tokens; otherwise row index[b, n], or n without an index
  int32_t round;  // base + row, and tanh(gate) or 1 + scale, are rounded
};

struct AdaLNNorm {
  NormKind kind;
  float eps;
  const void* weight;  // [D] or null
  const void* bias;    // [D] or null, kind layer only
  DType dtype;         // of both
  int32_t round;       // rms: the normed row is rounded before and after it meets the weight
};

// Every dtype is f32 or `half`.
struct AdaLNParams {
  int64_t batch, tokens;
  int32_t dim;  // 1 ... kAdaLNMaxDim
  DType half, row_dtype, base_dtype;
  AdaLNRows x, y;
  AdaLNTable gate, scale, shift;
  const int32_t* index;  // [B, N] by strides, or null
  int64_t index_batch_stride, index_stride;
  AdaLNNorm norm, post;
  int32_t tanh_gate;
  int32_t round_post;   // post(y)
  int32_t round_gated;  // act(gate) * post(y)
  int32_t round_new;    // x_new before the norm; it is stored rounded in any case
  int32_t round_chain;  // norm(x_new), its product with 1 + scale
  void* x_new;          // contiguous [B, N, D], dtype of x
  void* h;              // contiguous [B, N, D], dtype of x
};

// CUDA: launches on `stream` (a cudaStream_t) of a device with that many multiprocessors; returns 0 or a cudaError_t.
// An index outside its table reads the table's last row.
int cuda_adaln(const AdaLNParams& params, int processors, void* stream);

}  // namespace vdit

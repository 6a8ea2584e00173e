// QK norm, RoPE and placement of q, k and v in one pass. Used by all devices; no framework type, no CUDA type.
//
//   y = norm(x) * weight + bias,  y = max(y, 0) if relu          over one head, or over all heads of a token
//   out[i] = y[i] * cos[i] -/+ y[partner(i)] * sin[i]            for channels i < rotary of rotated tokens, else y[i]
#pragma once
#include "kernels/select/views.h"

namespace vdit {

enum class QkNorm : int32_t { none = 0, rms = 1, rms_across = 2, layer = 3 };

// Where intermediate results are rounded to the element type. `fast`: nowhere; `eager`: the norm's result and the
// output; `before_weight`: as diffusers.RMSNorm, which also rounds before the weight and before the bias, but with
// fp32 weights nowhere.
enum class QkRounding : int32_t { fast = 0, eager = 1, before_weight = 2 };

constexpr int kMaxRopeAxes = 4;

// cos and sin [1|B, rows, 1|H, rotary or rotary / 2], equal strides in elements, the last dimension contiguous.
struct RopeTable {
  const void *cos, *sin;  // null: this stream is not rotated
  int64_t batch_stride, row_stride, head_stride;
  TokenInts positions;  // row of every token, none outside [0, rows): not rotated; data null: row = token - start
  int32_t rows, start;
  DType dtype;
  int32_t half;  // one value per pair instead of one per channel
};

struct QkStream {
  TokenRows x;  // [B, N, H, D]
  void* out;    // [B, out_tokens, H, D], last dimension contiguous
  int64_t out_batch_stride, out_row_stride, out_head_stride;
  TokenInts rows;             // row of `out` for every token; data null: the token's own number
  const void *weight, *bias;  // [D], or [H * D] for rms_across; null: none
  RopeTable rope;
  int32_t tokens, heads, out_tokens;
  DType weight_dtype;  // of weight and bias
  int32_t copy;        // v: neither norm nor rotation
};

struct QkNormRopeParams {
  QkStream stream[3];
  int32_t streams, batch, dim;
  int32_t rotary;               // rotated channels, even; 0: no RoPE
  int32_t axes;                 // 0: pairs are neighbours
  int32_t width[kMaxRopeAxes];  // channels of each axis, whose two halves are paired; together `rotary`
  DType dtype;
  QkNorm norm;
  QkRounding rounding;
  int32_t round_products;  // RoPE's products are rounded too: its arithmetic is in the element type
  int32_t relu;
  float eps;
};

static_assert(sizeof(QkNormRopeParams) < 4096, "CUDA kernel arguments are limited to 4 KB");

constexpr int kMaxAcrossWidth = 16384;  // H * D of rms_across on GPUs
constexpr int kMaxHeadDim = 256;

// CUDA: launches on `stream` (a cudaStream_t); returns 0 or a cudaError_t. Tokens whose row lies outside `out` are not
// written.
int cuda_qk_norm_rope(const QkNormRopeParams& params, void* stream);

}  // namespace vdit

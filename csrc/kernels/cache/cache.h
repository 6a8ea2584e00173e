// The kernels of the feature cache, each one pass over [B, N, D]:
//
//   factor_update       F_0 <- output - minus;  F_{i+1} <- (F_i new - F_i old) / distance
//   forecast_gate_add   out  = x + sum_j gate_j * sum_i weight_i * F_ij
//
// A factor is contiguous; those of one module lie factor_stride elements apart. Without gates nothing depends on the
// shape, so a tensor that is contiguous as a whole may be passed as rows of any length: `total` cuts the last one.
// Rows and tables are those of the adaptive norms. Every dtype is f32 or `half`; arithmetic is fp32.
//
// Where there are scales, factors are e4m3 codes, and row r of factor i stands for code * scales[i * scale_stride + r].
// Rows are then those of [B, N, D]: total is batch * tokens * dim. A row's scale is the smallest power of two, at least
// 2^-126, with which no finite number of the row is beyond 448 times it, so that dividing by it is exact; factors are
// read, worked with and rounded anew. Infinity is stored as NaN, and what would be rounded beyond fp32's range as the
// largest code within it.
#pragma once
#include "kernels/fused/adaln.h"

namespace vdit {

constexpr int kMaxFactors = 5, kMaxForecastModules = 3;
constexpr int kMaxScaledRow = 16384;  // elements of a row that has a scale

// Of the scale 2^120, under which a code of 256 or more would stand for 2^128: the largest number that has a code.
constexpr int32_t kTopExponent = 247;
constexpr uint32_t kTopBits = 0x7f700000;  // 240 * 2^120

struct FactorUpdateParams {
  int64_t batch, tokens, total;  // total: elements, more than (batch * tokens - 1) * dim
  int32_t dim;
  DType half, factor_dtype;
  AdaLNRows output, minus;  // minus null: nothing is subtracted
  void* factors;
  int64_t factor_stride;
  float* scales;  // null: factors are of factor_dtype
  int64_t scale_stride;
  int32_t last;    // F_0 ... F_last are written, those before F_last are read
  int32_t stream;  // CPU: F_last goes past the caches
  float distance;
};

struct ForecastModule {
  const void* factors;
  int64_t factor_stride;
  AdaLNTable gate;      // null: 1
  const float* scales;  // null: factors are of factor_dtype; in all modules or in none
  int64_t scale_stride;
};

struct ForecastParams {
  int64_t batch, tokens, total;
  int32_t dim;
  DType half, factor_dtype, row_dtype, base_dtype, out_dtype;
  AdaLNRows x;  // of out_dtype; null: 0
  void* out;    // may be x
  int64_t out_batch_stride, out_token_stride;
  const int32_t* index;  // [B, N] by strides, or null
  int64_t index_batch_stride, index_stride;
  ForecastModule module[kMaxForecastModules];
  float weight[kMaxFactors];
  int32_t modules, factors;  // the first `factors` of every module are read
  int32_t round;             // every forecast, its product with a rounded gate, and every sum are rounded to out_dtype
  int32_t stream;            // CPU: out goes past the caches
};

// CUDA: launch on `stream` (a cudaStream_t); return 0 or a cudaError_t. An index outside its table reads the table's
// last row.
int cuda_factor_update(const FactorUpdateParams& params, void* stream);
int cuda_forecast_gate_add(const ForecastParams& params, void* stream);

}  // namespace vdit

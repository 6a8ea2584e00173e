// Rows of [M, C] added up by weight, and the residual of the branch they make, one pass over the result [N, C]:
//
//   sum[n] = base[n] + sum_j weights[n, j] * source[slots[n, j]]
//   out[n] = residual[n] + gate[n / rows_per_gate] * sum[n]
//
// Absent parts are skipped: no base is 0, no weights are 1, no gate is 1, no residual is 0. So is a slot outside [0,
// M), -1 by convention; a row without base whose slots are all outside is its residual, bit for bit. Sums are fp32,
// base first, then by j.
#pragma once
#include "kernels/types.h"

namespace vdit {

constexpr int kCombineMaxSlots = 8;

struct CombineRowsParams {
  int64_t rows, sources;  // N, M
  int64_t rows_per_gate;  // at least 1
  int32_t dim, slots_per_row;
  DType dtype;  // of every tensor but slots and weights
  const void* source;
  const int32_t* slots;                                              // contiguous [N, slots_per_row]
  const float* weights;                                              // contiguous [N, slots_per_row] or null
  const void* base;                                                  // [N, C] or null
  const void* residual;                                              // [N, C] or null
  const void* gate;                                                  // [ceil(N / rows_per_gate), C] or null
  int64_t source_stride, base_stride, residual_stride, gate_stride;  // of rows; columns are contiguous
  void* out;                                                         // contiguous [N, C]
};

// CUDA: launches on `stream` (a cudaStream_t); returns 0 or a cudaError_t.
int cuda_combine_rows(const CombineRowsParams& params, void* stream);

}  // namespace vdit

// Some rows of a sequence taken out, and put back: the arguments of gather_rows and scatter_rows.
#pragma once
#include <cstdint>

#include "kernels/types.h"

namespace vdit {

constexpr int kMaxRowTensors = 4;

// A tensor with all rows and one with some of them, [B, N, row] and [B, K, row]: strides in bytes, rows contiguous.
struct RowPair {
  void* full;
  void* part;
  int64_t full_batch, full_row, part_batch, part_row;
  int64_t row_bytes;
};

// Factors of `part`, [B, K, width], fp32 or of the tensors' dtype: strides in elements, 0 where broadcast (the last is
// 0 or 1). data == nullptr: not given.
struct RowGate {
  const void* data;
  DType dtype;
  int64_t batch, slot, channel;
};

struct RowsParams {
  RowPair pair[kMaxRowTensors];
  int32_t pairs, batch, tokens, slots;
  const int32_t* rows;  // [B, K]: the row of `full` that belongs to a slot of `part`
  int64_t rows_batch, rows_slot;
  const int32_t* count;  // [B]: slots in use, the first ones; nullptr: all
  int64_t count_batch;
  DType dtype;  // of all tensors, where a gate or `add` makes it matter
  int32_t add;
  RowGate gate;
};

// CUDA: launch on `stream` (a cudaStream_t); return 0 or a cudaError_t. Slots that are not in use, and those whose row
// is outside [0, N), give rows of zeros (gather) or are left out (scatter). Nothing is read back.
//   gather    part[b, i] = full[b, rows[b, i]]
//   scatter   full[b, rows[b, i]] = (add ? full[b, rows[b, i]] : 0) + gate[b, i] * part[b, i], the rows being distinct
int cuda_gather_rows(const RowsParams& params, void* stream);
int cuda_scatter_rows(const RowsParams& params, void* stream);

}  // namespace vdit

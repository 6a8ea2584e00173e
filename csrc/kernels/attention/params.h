// What every attention kernel is given: the tensors and an AttentionPlan (docs/plan.md has the format). No framework
// types, no CUDA types: the same structure goes to the GPU kernels and to the emulator.
//
// Nothing in it was read back to the host: plans, orders and lengths stay on the device, so kernels clamp what they
// read (a bad plan gives wrong numbers, never an access outside the tensors).
#pragma once
#include <cstdint>

#include "kernels/types.h"

namespace vdit::gpu {

constexpr int kMaxSegments = 8;  // bounds the size of a kernel argument

// [B, N, H, D]: any strides in elements, the last dimension contiguous, rows 16-byte aligned.
struct Rows {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

// Permutation int32 [batch or 1, heads or 1, n]: position p holds original token order[p]. data == nullptr: identity.
struct Order {
  const int32_t* data;
  int32_t batch, heads;
};

struct Segment {
  Rows k, v;       // batch_stride 0 where one segment serves the whole batch
  int32_t length;  // keys, all read by every query
};

struct Plan {
  const int32_t* tiles;      // [num_tiles, 3]: plan batch*heads index, q_start, q_len (any length, 0 = unused capacity)
  const int32_t* run_ptr;    // [num_tiles + 1]
  const int32_t* runs;       // [num_runs, 3]: kv_start, kv_len, first word of its mask or -1
  const int32_t* mask_bits;  // row i of a run of n keys: ceil(n / 32) words from `mask + i * ceil(n / 32)`
  int32_t num_tiles, num_runs;
  int64_t num_mask_words;
  int32_t batch, heads;  // 1 broadcasts
  Order q_order, kv_order;
};

struct AttentionParams {
  Rows q, k, v;
  int32_t batch, heads, kv_heads, dim, lq, lk;
  DType dtype;  // f16 or bf16
  float scale;
  Plan plan;               // plan.tiles == nullptr: dense
  const float* row_scale;  // [B, H, Lq] or null; multiplies the output rows, not the lse
  const void* kv_len;      // [B] or null: keys of original index >= kv_len[b] are never read
  int32_t kv_len_bytes;    // 4 or 8 per entry
  int32_t num_segments;
  Segment segment[kMaxSegments];
};

struct AttentionOutputs {
  void* out;   // contiguous [B, Lq, H, D], dtype of q
  float* lse;  // contiguous [B, H, Lq], natural logarithm; empty rows: out 0, lse -inf
};

}  // namespace vdit::gpu

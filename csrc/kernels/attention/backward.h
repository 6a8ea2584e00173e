// Gradients of attention on a GPU: the host entry, and the seam between it and the kernels of one head dim.
//
//   attention_backward   row statistics and lists (backward_prepare.h), then the two kernels below
//   launch_dq            dq, one CTA per work item of the forward (backward_dq.h)
//   launch_dkv           dk, dv and those of the segments, one CTA per 64 keys (backward_dkv.h)
//
// Every gradient is written by one thread in a fixed order of additions: no atomics, the same bits every time. Nothing
// is read back to the host.
#pragma once
#include "kernels/attention/forward.h"

namespace vdit::gpu {

constexpr int kMaxBackwardDim = 128;

struct BackwardParams {
  AttentionParams forward;  // what the forward was called with
  Rows dout, out;           // [B, Lq, H, D]
  const float* lse;         // contiguous [B, H, Lq]
  const float* dlse;        // the same or null
};

// Contiguous, in the dtype of q; every element is written.
struct BackwardOutputs {
  void *dq, *dk, *dv;              // [B, Lq, H, D], [B, Lk, Hkv, D]
  void* segment_dk[kMaxSegments];  // [segment_batch, length, Hkv, D]
  void* segment_dv[kMaxSegments];
  int32_t segment_batch[kMaxSegments];  // 1: summed over the batch; else the batch
};

// What the kernels know of a query row, 16 bytes that are copied whole.
//   weight   P = 2^(score * log2(e) - lse2)       lse2 is +inf for an empty row
//   dscore   dS = P * (row_scale * <dout, v> - delta)
// All zeros add nothing to any sum of a zero query: what is copied for a row that does not exist.
struct RowRecord {
  float lse2, delta, row_scale, unused;
};

struct BackwardArgs {
  AttentionParams params;
  Rows dout;
  BackwardOutputs grads;
  RowRecord* records;  // [B, H, Lq]
  Work work;           // of launch_dq
  // Tiles of plan batch*heads index i, in the order of the plan: by_head[head_ptr[i]] .. by_head[head_ptr[i + 1] - 1].
  int32_t *by_head, *head_ptr;
  // Query heads whose gradients a CTA sums: all that share a key/value head, or 1 and fp32 parts [B, H, Lk, D] where
  // these heads have orders of their own.
  int32_t heads_per_block;
  float *part_dk, *part_dv;
  float scale_log2;  // |scale| * log2(e), never 0: then masked scores of -inf stay -inf
  uint32_t sign;     // xor of two elements of one side of Q K^T: the sign of scale
};

size_t attention_backward_workspace_bytes(const BackwardParams& params);

// Returns 0, or a CUDA error code. The workspace is 16-byte aligned.
int attention_backward(const BackwardParams& params, const BackwardOutputs& outputs, void* workspace, size_t bytes,
                       void* stream);

namespace backward {

constexpr int kBlockKeys = 64;

// CTAs of launch_dkv, or -1 if a grid has no room for them.
int64_t dkv_blocks(const BackwardArgs& args);

int launch_dq_64(const BackwardArgs& args, void* stream);
int launch_dq_96(const BackwardArgs& args, void* stream);
int launch_dq_128(const BackwardArgs& args, void* stream);
int launch_dkv_64(const BackwardArgs& args, void* stream);
int launch_dkv_96(const BackwardArgs& args, void* stream);
int launch_dkv_128(const BackwardArgs& args, void* stream);

}  // namespace backward
}  // namespace vdit::gpu

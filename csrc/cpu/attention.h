// Plan-driven attention on the CPU: the parameters of one call and the two entry points. No framework types.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/types.h"

namespace vdit {

// A strided [B, N, H, D] tensor; strides in elements.
struct View4 {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};
};

// Permutation [batch or 1, heads or 1, n]: position p holds the original token order[p].
struct OrderView {
  const int32_t* data = nullptr;
  int64_t batch = 1, heads = 1, n = 0;
  const int32_t* row(int64_t b, int64_t h) const {
    return data == nullptr ? nullptr : data + ((batch > 1 ? b : 0) * heads + (heads > 1 ? h : 0)) * n;
  }
};

// The run lists of an AttentionPlan (python/vdit_fast/plan/plan.py documents the format).
struct PlanView {
  int64_t batch = 1, heads = 1;
  int64_t num_tiles = 0;
  const int32_t* tiles = nullptr;    // [num_tiles, 3]: batch*heads index, q_start, q_len
  const int32_t* run_ptr = nullptr;  // [num_tiles + 1]
  const int32_t* runs = nullptr;     // [*, 3]: kv_start, kv_len, mask word offset or -1
  const int32_t* mask_bits = nullptr;
  OrderView q_order, kv_order;
};

struct SegmentView {
  View4 k, v;
};

struct AttentionParams {
  View4 q, k, v;
  float scale = 1.f;
  PlanView plan;
  const float* row_scale = nullptr;   // [B, H, Lq] or null
  const int64_t* kv_len = nullptr;    // [B] or null
  std::vector<SegmentView> segments;  // batch 1 broadcasts
};

struct ForwardOutputs {
  View4 out;             // [B, Lq, H, D], dtype of q
  float* lse = nullptr;  // [B, H, Lq]
};

struct BackwardInputs {
  View4 dout, out;
  const float* lse = nullptr;   // [B, H, Lq]
  const float* dlse = nullptr;  // [B, H, Lq] or null
};

// fp32 accumulators; dk, dv and the segments' gradients must be zero on entry.
struct BackwardOutputs {
  View4 dq;  // dtype of q
  View4 dk, dv;
  std::vector<SegmentView> segments;
};

// Runs fn(0..n-1), each index once, on the caller's thread pool; passes on the first exception.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t)>& fn)>;

void attention_forward_cpu(const AttentionParams& p, const ForwardOutputs& o, const ParallelFor& parallel);
void attention_backward_cpu(const AttentionParams& p, const BackwardInputs& in, const BackwardOutputs& o,
                            const ParallelFor& parallel);

}  // namespace vdit

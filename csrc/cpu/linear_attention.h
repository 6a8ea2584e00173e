// CPU twin of kernels/linear/linear_attention.h. Weights and states are packed into panels once; then work items go
// through their tokens a tile at a time: project, map, multiply.
#pragma once
#include "cpu/attention.h"
#include "kernels/linear/linear_attention.h"

namespace vdit {

constexpr int kLinearTile = 96;     // tokens; a multiple of every micro-kernel height (4, 6, 12)
constexpr int kLinearAlign = 32;    // floats: the widest panel
constexpr int kLinearSplits = 16;   // most parts of a sequence
constexpr int kLinearPart = 1536;   // fewest tokens of a part, where there are more parts than one
constexpr int kLinearBlock = 1536;  // queries of a work item

constexpr int64_t linear_round(int64_t n) { return (n + kLinearAlign - 1) / kLinearAlign * kLinearAlign; }

// Floats of memory that a work item needs besides its result.
constexpr int64_t linear_scratch(int64_t dim, int64_t features, int64_t dim_v) {
  return kLinearTile * (2 * linear_round(dim) + linear_round(features) + kLinearAlign + linear_round(dim_v));
}

// One per instruction set. All are safe to call from many threads and allocate nothing.
struct LinearKernels {
  // W of a head in panels: linear_round(dim) * dim floats.
  void (*pack_weight)(const LinearWeight& weight, int64_t head, int dim, float* panels);
  // The columns of values of a state in panels: features * linear_round(dim_v) floats; the last column to `sums`.
  void (*pack_state)(const float* state, int features, int dim_v, float* panels, float* sums);
  // Tokens [first, last) of a head, added to `state` [features][linear_round(dim_v)] and `sums` [linear_round(features)
  // + kLinearAlign]. panels: of the weight, or null.
  void (*state)(const LinearStateParams& p, int64_t batch, int64_t head, const float* panels, int64_t first,
                int64_t last, float* state, float* sums, float* scratch);
  // Queries [first, last) of a head. weight: panels or null.
  void (*readout)(const LinearReadoutParams& p, int64_t batch, int64_t head, const float* weight, const float* panels,
                  const float* sums, int64_t first, int64_t last, float* scratch);
};

void linear_state_cpu(const LinearStateParams& p, const int64_t* kv_len, const ParallelFor& parallel);
void linear_readout_cpu(const LinearReadoutParams& p, const ParallelFor& parallel);

}  // namespace vdit

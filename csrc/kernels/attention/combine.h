// Merges the parts of split keys (Work::part_out, part_lse) by their log-sum-exp, in a fixed order.
#pragma once
#include "kernels/attention/work.h"

namespace vdit::gpu {

constexpr int kMaxSplits = 32;  // one lane per part
constexpr int kCombineThreads = 128;
constexpr float kLn2 = 0.69314718055994530942f;

// One CTA per item, one warp per row. A part that read nothing has lse -inf and no values: it is skipped, not weighted
// with 0.
template <class T>
VD_KERNEL(kCombineThreads, 1)
combine(const VD_GRID_CONST ForwardArgs args) {
  const AttentionParams& p = args.params;
  const Work& w = args.work;
  const Item item = locate(p, w, blockIdx.x);
  const int32_t* q_order = order_row(p.plan.q_order, item.batch, item.head, p.lq);
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < item.rows; row += kCombineThreads / 32) {
    const int32_t position = item.start + row;
    const int32_t original = q_order != nullptr ? q_order[position] : position;
    if (original < 0 || original >= p.lq) continue;
    const int64_t part = (int64_t(blockIdx.x) * w.splits) * w.rows + row;  // parts of this row are w.rows apart
    const float mine = lane < w.splits ? w.part_lse[part + int64_t(lane) * w.rows] : -INFINITY;
    float top = mine;
    VD_UNROLL for (int step = 16; step > 0; step /= 2) top = fmaxf(top, arch::shfl_xor_f(top, step));
    const float e = arch::ex2(mine - (top == -INFINITY ? 0.f : top));
    float sum = e;
    VD_UNROLL for (int step = 16; step > 0; step /= 2) sum += arch::shfl_xor_f(sum, step);
    const int64_t lse_at = (int64_t(item.batch) * p.heads + item.head) * p.lq + original;
    const float scale = sum == 0.f ? 0.f : (p.row_scale != nullptr ? p.row_scale[lse_at] : 1.f) / sum;
    if (lane == 0) args.outputs.lse[lse_at] = sum == 0.f ? -INFINITY : (top + log2f(sum)) * kLn2;

    float o[8] = {};
    const bool inside = lane * 8 < p.dim;
    for (int s = 0; s < w.splits; ++s) {
      const float weight = arch::shfl_f(e, s), lse = arch::shfl_f(mine, s);
      if (lse == -INFINITY || !inside) continue;
      const float* from = w.part_out + (part + int64_t(s) * w.rows) * p.dim + lane * 8;
      VD_UNROLL for (int i = 0; i < 8; ++i) o[i] += weight * from[i];
    }
    if (!inside) continue;
    uint32_t packed[4];
    VD_UNROLL for (int i = 0; i < 4; ++i) packed[i] =
        sum == 0.f ? 0u : arch::pack<T>(o[2 * i] * scale, o[2 * i + 1] * scale);
    char* to = static_cast<char*>(args.outputs.out) +
               ((int64_t(item.batch) * p.lq + original) * p.heads + item.head) * p.dim * 2 + lane * 16;
    arch::stg128(to, uint4{packed[0], packed[1], packed[2], packed[3]});
  }
}

}  // namespace vdit::gpu

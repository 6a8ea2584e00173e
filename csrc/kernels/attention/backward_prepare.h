// Small kernels around those of backward_dq.h and backward_dkv.h: statistics of query rows, tiles of a head, sums of
// partial gradients.
#pragma once
#include "kernels/attention/backward.h"
#include "kernels/attention/schedule.h"

namespace vdit::gpu::backward {

constexpr int kRecordThreads = 256, kRecordLanes = 16;  // lanes of a row: 8 elements each
constexpr float kLog2e = 1.44269504088896340736f;

struct RecordArgs {
  BackwardParams in;
  RowRecord* records;
};

// delta = <dout, out> - dlse. `out` already holds the row scale, so this is <row_scale * dout, unscaled out>.
template <class T>
VD_KERNEL(kRecordThreads, 1)
row_records(const VD_GRID_CONST RecordArgs a) {
  const AttentionParams& p = a.in.forward;
  constexpr int kRowsPerBlock = kRecordThreads / kRecordLanes;
  const int64_t rows = int64_t(p.batch) * p.heads * p.lq;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kRecordLanes;
  const int lane = threadIdx.x % kRecordLanes;
  const int32_t n = int32_t(row % p.lq);
  const int32_t head = int32_t(row / p.lq % p.heads), batch = int32_t(row / p.lq / p.heads);
  float delta = 0.f;
  if (row < rows && lane * 8 < p.dim) {
    const uint4 x = arch::ldg128(row_pointer(a.in.dout, batch, head, n, 2) + lane * 16);
    const uint4 y = arch::ldg128(row_pointer(a.in.out, batch, head, n, 2) + lane * 16);
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
    VD_UNROLL for (int i = 0; i < 4; ++i) {
      float x0, x1, y0, y1;
      arch::unpack<T>(xs[i], x0, x1);
      arch::unpack<T>(ys[i], y0, y1);
      delta = fmaf(x1, y1, fmaf(x0, y0, delta));
    }
  }
  VD_UNROLL for (int step = kRecordLanes / 2; step > 0; step /= 2) delta += arch::shfl_xor_f(delta, step);
  if (row >= rows || lane != 0) return;
  const float lse = a.in.lse[row];
  const bool empty = lse == -INFINITY;
  if (a.in.dlse != nullptr && !empty) delta -= a.in.dlse[row];
  a.records[row] = {empty ? INFINITY : lse * kLog2e, delta, p.row_scale != nullptr ? p.row_scale[row] : 1.f, 0.f};
}

// CTA i lists the tiles of plan batch*heads index i, in the order of the plan. A thread owns a strip of neighbouring
// tiles; those of smaller indices are counted to know where the list begins.
VD_KERNEL(kScheduleThreads, 1)
tiles_by_head(const VD_GRID_CONST Plan plan, int32_t lq, int32_t* by_head, int32_t* head_ptr) {
  VD_SHARED(uint64_t, before_totals, kScheduleThreads / 32);
  VD_SHARED(uint64_t, mine_totals, kScheduleThreads / 32);
  const int32_t strip = (plan.num_tiles + kScheduleThreads - 1) / kScheduleThreads, index = int32_t(blockIdx.x);
  const int64_t first = int64_t(threadIdx.x) * strip;
  const int64_t last = first + strip < plan.num_tiles ? first + strip : plan.num_tiles;
  uint64_t before = 0, mine = 0;
  for (int64_t t = first; t < last; ++t) {
    const TileRows tile = load_tile(plan, lq, int32_t(t));
    before += tile.rows > 0 && tile.bh < index;
    mine += tile.rows > 0 && tile.bh == index;
  }
  block_inclusive_sum(before, before_totals);
  uint64_t begin = 0;
  for (int i = 0; i < kScheduleThreads / 32; ++i) begin += before_totals[i];
  const uint64_t end = begin + block_inclusive_sum(mine, mine_totals);
  uint64_t at = end - mine;
  for (int64_t t = first; t < last; ++t) {
    const TileRows tile = load_tile(plan, lq, int32_t(t));
    if (tile.rows > 0 && tile.bh == index) by_head[at++] = int32_t(t);
  }
  if (threadIdx.x == kScheduleThreads - 1) {
    head_ptr[index] = int32_t(begin);
    if (blockIdx.x + 1 == gridDim.x) head_ptr[index + 1] = int32_t(end);
  }
}

constexpr int kSumThreads = 256;

// Adds the parts of the query heads that share a key/value head, in order. A thread handles 8 elements of a row.
template <class T>
VD_KERNEL(kSumThreads, 1)
sum_parts(const VD_GRID_CONST BackwardArgs a) {
  const AttentionParams& p = a.params;
  const int32_t group = p.heads / p.kv_heads, chunks = p.dim / 8;
  const int64_t count = int64_t(p.batch) * p.lk * p.kv_heads * chunks;
  for (int64_t i = int64_t(blockIdx.x) * kSumThreads + threadIdx.x; i < count; i += int64_t(gridDim.x) * kSumThreads) {
    const int64_t row = i / chunks, key = row / p.kv_heads % p.lk, batch = row / p.kv_heads / p.lk;
    const int64_t head = row % p.kv_heads * group;
    VD_UNROLL for (int which = 0; which < 2; ++which) {
      const float* part =
          (which == 0 ? a.part_dk : a.part_dv) + ((batch * p.heads + head) * p.lk + key) * p.dim + i % chunks * 8;
      float sum[8] = {};
      for (int g = 0; g < group; ++g) {
        VD_UNROLL for (int e = 0; e < 8; ++e) sum[e] += part[int64_t(g) * p.lk * p.dim + e];
      }
      arch::stg128(static_cast<char*>(which == 0 ? a.grads.dk : a.grads.dv) + i * 16,
                   uint4{arch::pack<T>(sum[0], sum[1]), arch::pack<T>(sum[2], sum[3]), arch::pack<T>(sum[4], sum[5]),
                         arch::pack<T>(sum[6], sum[7])});
    }
  }
}

}  // namespace vdit::gpu::backward

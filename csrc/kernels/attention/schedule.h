// Device kernels around an attention kernel: the list of work items, and the rows that no tile covers.
#pragma once
#include "kernels/attention/work.h"
#include "kernels/block_sum.h"

namespace vdit::gpu {

constexpr int kScheduleThreads = 512;
constexpr int kHeaderBytes = 16;

// One CTA: cuts the tiles into items of at most `rows` rows, in the order of the tiles (a plan puts most work first).
// A thread owns a strip of neighbouring tiles: count, sum over the block, write.
VD_KERNEL(kScheduleThreads, 1)
schedule(const VD_GRID_CONST Plan plan, int32_t lq, int32_t rows, int32_t capacity, int32_t* items, int32_t* header) {
  VD_SHARED(uint64_t, item_totals, kScheduleThreads / 32);
  VD_SHARED(uint64_t, row_totals, kScheduleThreads / 32);
  const int32_t strip = (plan.num_tiles + kScheduleThreads - 1) / kScheduleThreads;
  const int64_t first = int64_t(threadIdx.x) * strip;
  const int64_t last = first + strip < plan.num_tiles ? first + strip : plan.num_tiles;
  uint64_t count = 0, covered = 0;
  for (int64_t t = first; t < last; ++t) {
    const int32_t n = load_tile(plan, lq, int32_t(t)).rows;
    count += (n + rows - 1) / rows;
    covered += n;
  }
  const uint64_t end = block_inclusive_sum(count, item_totals);
  const uint64_t all_covered = block_inclusive_sum(covered, row_totals);
  uint64_t at = end - count;
  for (int64_t t = first; t < last; ++t) {
    const int32_t n = load_tile(plan, lq, int32_t(t)).rows;
    for (int32_t row = 0; row < n && at < uint64_t(capacity); row += rows, ++at) {  // overlapping tiles may exceed it
      items[2 * at] = int32_t(t);
      items[2 * at + 1] = row;
    }
  }
  if (threadIdx.x == kScheduleThreads - 1) {
    header[0] = end < uint64_t(capacity) ? int32_t(end) : capacity;
    header[1] = all_covered == uint64_t(plan.batch) * plan.heads * lq;
  }
}

constexpr int kFillThreads = 256;

// Empty rows everywhere, unless the tiles cover every row: out 0, lse -inf. `chunks`: 16-byte pieces of out.
VD_KERNEL(kFillThreads, 1)
fill_empty(void* out, int64_t chunks, float* lse, int64_t rows, const int32_t* header) {
  if (header[1] != 0) return;
  const int64_t step = int64_t(gridDim.x) * kFillThreads;
  const int64_t first = int64_t(blockIdx.x) * kFillThreads + threadIdx.x;
  for (int64_t i = first; i < chunks; i += step) static_cast<uint4*>(out)[i] = uint4{0, 0, 0, 0};
  for (int64_t i = first; i < rows; i += step) lse[i] = -INFINITY;
}

}  // namespace vdit::gpu

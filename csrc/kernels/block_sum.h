// Sums over the threads of a block.
#pragma once
#include "arch/arch.h"

namespace vdit::gpu {

VD_DEV uint64_t shfl_u64(uint64_t v, int lane) {
  const uint32_t low = arch::shfl(uint32_t(v), lane);
  return low | uint64_t(arch::shfl(uint32_t(v >> 32), lane)) << 32;
}

// Inclusive sum over the lanes of a warp.
VD_DEV uint64_t warp_inclusive_sum(uint64_t v) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int step = 1; step < 32; step *= 2) {
    const uint64_t below = shfl_u64(v, lane >= step ? lane - step : lane);
    if (lane >= step) v += below;
  }
  return v;
}

VD_DEV uint32_t warp_inclusive_sum(uint32_t v) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int step = 1; step < 32; step *= 2) {
    const uint32_t below = arch::shfl(v, lane >= step ? lane - step : lane);
    if (lane >= step) v += below;
  }
  return v;
}

// Inclusive sum over the block. `totals` has one entry per warp; calls with the same array need a barrier in between.
VD_DEV uint64_t block_inclusive_sum(uint64_t v, uint64_t* totals) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  v = warp_inclusive_sum(v);
  if (lane == 31) totals[warp] = v;
  arch::syncthreads();
  for (int i = 0; i < warp; ++i) v += totals[i];
  return v;
}

}  // namespace vdit::gpu

// Kernels that break one rule each when number[0] is 1, and are right when it is 0 (tests/emulator/
// test_emulator_alarms.py). in[0]: 4 KiB of random words, out[0]: 4 KiB.
#pragma once
#include "emulator/selftest/selftest.h"

namespace vdit::selftest {

VD_DEV bool broken(const Io& io) { return io.number[0] != 0; }
VD_DEV const uint32_t* source(const Io& io) { return input<uint32_t>(io, 0) + 4 * threadIdx.x; }
VD_DEV uint32_t* target(const Io& io) { return output<uint32_t>(io, 0) + 4 * threadIdx.x; }

VD_KERNEL(32, 1) copy_not_waited_for(const VD_GRID_CONST Io io) {
  VD_DYN_SMEM(smem);
  const uint32_t at = arch::smem_u32(smem) + 16 * threadIdx.x;
  arch::cp_async16(at, source(io), true);
  arch::cp_async_commit();
  if (!broken(io)) arch::cp_async_wait<0>();
  arch::stg128(target(io), arch::lds128(at));
  arch::cp_async_wait<0>();
}

VD_KERNEL(64, 1) copy_wait_without_barrier(const VD_GRID_CONST Io io) {  // a wait covers the thread's own copies only
  VD_DYN_SMEM(smem);
  const uint32_t base = arch::smem_u32(smem);
  arch::cp_async16(base + 16 * threadIdx.x, source(io), true);
  arch::cp_async_commit();
  arch::cp_async_wait<0>();
  if (!broken(io)) arch::syncthreads();
  arch::stg128(target(io), arch::lds128(base + 16 * (63 - threadIdx.x)));
}

VD_KERNEL(32, 1) copy_into_live_stage(const VD_GRID_CONST Io io) {  // write after read
  VD_DYN_SMEM(smem);
  const uint32_t at = arch::smem_u32(smem) + 16 * threadIdx.x, next = broken(io) ? at : at + 512;
  arch::cp_async16(at, source(io), true);
  arch::cp_async_commit();
  arch::cp_async_wait<0>();
  arch::cp_async16(next, source(io) + 128, true);
  arch::cp_async_commit();
  arch::stg128(target(io), arch::lds128(at));
  arch::cp_async_wait<0>();
}

VD_KERNEL(32, 1) copy_left_in_flight(const VD_GRID_CONST Io io) {
  VD_DYN_SMEM(smem);
  arch::cp_async16(arch::smem_u32(smem) + 16 * threadIdx.x, source(io), true);
  arch::cp_async_commit();
  if (!broken(io)) arch::cp_async_wait<0>();
}

VD_KERNEL(32, 1) shared_out_of_bounds(const VD_GRID_CONST Io io) {
  VD_DYN_SMEM(smem);  // 512 bytes
  arch::sts128(arch::smem_u32(smem) + 16 * (threadIdx.x + (broken(io) ? 1 : 0)), arch::ldg128(source(io)));
}

VD_KERNEL(32, 1) shared_misaligned(const VD_GRID_CONST Io io) {
  VD_DYN_SMEM(smem);
  arch::stg128(target(io), arch::lds128(arch::smem_u32(smem) + (broken(io) ? 8 : 16) * (threadIdx.x % 16)));
}

VD_KERNEL(32, 1) global_out_of_bounds_read(const VD_GRID_CONST Io io) {
  arch::stg128(target(io), arch::ldg128(source(io) + (broken(io) && threadIdx.x == 7 ? 1024 : 0)));
}

VD_KERNEL(32, 1) global_out_of_bounds_write(const VD_GRID_CONST Io io) {
  arch::stg32(target(io) + (broken(io) && threadIdx.x == 7 ? 1024 : 0), 1);
}

VD_KERNEL(32, 1) global_write_to_input(const VD_GRID_CONST Io io) {
  if (broken(io)) arch::stg32(const_cast<uint32_t*>(source(io)), 1);
}

VD_KERNEL(32, 1) global_misaligned(const VD_GRID_CONST Io io) {
  arch::stg128(target(io), arch::ldg128(source(io) + (broken(io) ? 2 : 0)));
}

VD_KERNEL(32, 1) shuffle_in_divergent_branch(const VD_GRID_CONST Io io) {
  uint32_t v = source(io)[0];
  if (!broken(io) || threadIdx.x < 16) v = arch::shfl_xor(v, 1);
  target(io)[0] = v;
}

VD_KERNEL(32, 1) different_collectives(const VD_GRID_CONST Io io) {
  const uint32_t v = source(io)[0];
  target(io)[0] = broken(io) && threadIdx.x % 2 ? arch::vote_ballot(v & 1) : arch::shfl(v, 3);
}

VD_KERNEL(64, 1) barrier_in_divergent_warp(const VD_GRID_CONST Io io) {  // 16 + 16 threads of two warps fill a barrier
  if (!broken(io))
    arch::bar_sync(1, 64);
  else if (threadIdx.x % 32 < 16)
    arch::bar_sync(1, 32);
}

VD_KERNEL(64, 1) barrier_missing_threads(const VD_GRID_CONST Io io) {
  if (threadIdx.x < 32 || !broken(io)) arch::bar_sync(1, 64);
}

VD_KERNEL(64, 1) barrier_counts_differ(const VD_GRID_CONST Io io) {
  arch::bar_sync(1, broken(io) && threadIdx.x >= 32 ? 96 : 64);
}

VD_KERNEL(64, 1) barrier_left_half_arrived(const VD_GRID_CONST Io io) {
  if (threadIdx.x < 32)
    arch::bar_arrive(1, 64);
  else if (!broken(io))
    arch::bar_sync(1, 64);
}

VD_KERNEL(32, 1) endless_loop(const VD_GRID_CONST Io io) {
  volatile uint32_t* flag = output<uint32_t>(io, 0);
  if (broken(io))
    while (flag[0] != 1) {
    }
}

VD_KERNEL(64, 1) endless_trading(const VD_GRID_CONST Io io) {  // goes on synchronising for ever
  do arch::syncthreads();
  while (broken(io));
}

// A full and an empty barrier, one stage, one producer warp, one consumer warp, TMA or plain stores.
struct MbarSetup {
  uint32_t full, empty, stage;
};

VD_DEV MbarSetup mbar_setup(unsigned char* smem, uint64_t* bars, uint32_t full_count, bool fence) {
  const MbarSetup s{arch::smem_u32(bars), arch::smem_u32(bars) + 8, aligned(smem)};
  if (threadIdx.x == 0) {
    arch::mbar_init(s.full, full_count);
    arch::mbar_init(s.empty, 1);
    if (fence) arch::fence_mbar_init();
  }
  arch::syncthreads();
  return s;
}

// number[0]: 1 consumer does not wait, 2 waits for the wrong parity, 3 the consumer releases before it has read,
// 4 too many bytes expected, 5 init not fenced, 6 destination misaligned, 7 producer does not wait for the release,
// 8 too few bytes expected, 9 the last load is not waited for, 10 init again.
VD_KERNEL(64, 1) tma_pipeline(const VD_GRID_CONST IoTma p) {
  VD_DYN_SMEM(smem);
  VD_SHARED(uint64_t, bars, 2);
  const auto bug = p.io.number[0];
  const MbarSetup s = mbar_setup(smem, bars, 1, bug != 5);
  if (bug == 10 && threadIdx.x == 0) arch::mbar_init(s.full, 1);
  constexpr int kRounds = 4, kBytes = 1024;
  if (threadIdx.x == 0) {
    for (int r = 0; r < kRounds; ++r) {
      if (bug != 7) arch::mbar_wait(s.empty, (r & 1) ^ 1);
      arch::mbar_arrive_expect_tx(s.full, bug == 4 ? 2 * kBytes : bug == 8 ? kBytes / 2 : kBytes);
      arch::tma_load2(s.stage + (bug == 6 ? 128 : 0), &p.load, s.full, 0, 8 * r);
    }
  }
  if (threadIdx.x < 32) return;
  const int lane = threadIdx.x - 32;
  for (int r = 0; r < (bug == 9 ? kRounds - 1 : kRounds); ++r) {
    if (bug != 1) arch::mbar_wait(s.full, (r & 1) ^ (bug == 2 ? 1 : 0));
    if (bug == 3 && lane == 0) arch::mbar_arrive(s.empty);
    for (int half = 0; half < 2; ++half)
      arch::stg128(output<uint32_t>(p.io, 0) + 256 * r + 128 * half + 4 * lane,
                   arch::lds128(s.stage + 512 * half + 16 * lane));
    arch::syncwarp();
    if (bug != 3 && lane == 0) arch::mbar_arrive(s.empty);
  }
}

VD_KERNEL(32, 1) mbar_never_initialised(const VD_GRID_CONST Io io) {
  VD_SHARED(uint64_t, bars, 2);
  const uint32_t b = arch::smem_u32(bars);
  if (threadIdx.x == 0) arch::mbar_init(b, 1);
  arch::syncwarp();
  if (threadIdx.x == 0) arch::mbar_arrive(b + (broken(io) ? 8 : 0));
}

VD_KERNEL(32, 1) mbar_overwritten(const VD_GRID_CONST Io io) {
  VD_SHARED(uint64_t, bars, 2);
  const uint32_t b = arch::smem_u32(bars);
  if (threadIdx.x == 0) {
    arch::mbar_init(b, 1);
    arch::sts32(b + (broken(io) ? 4 : 8), 0);
    arch::mbar_arrive(b);
  }
}

VD_KERNEL(32, 1) mbar_too_many_arrivals(const VD_GRID_CONST Io io) {
  VD_SHARED(uint64_t, bars, 2);
  const uint32_t b = arch::smem_u32(bars);
  if (threadIdx.x == 0) {
    arch::mbar_init(b, 2);
    arch::mbar_init(b + 8, 1);
    arch::fence_mbar_init();
  }
  arch::syncwarp();
  if (threadIdx.x < 2) arch::mbar_arrive(b);
  arch::mbar_wait(b, 0);
  if (threadIdx.x == 0) {
    arch::mbar_arrive_tx(b, 16);  // keeps the phase open
    arch::mbar_arrive(b);
    if (broken(io)) arch::mbar_arrive(b);
  }
}

// number[0]: 1 no proxy fence before the store reads, 2 not waited for, 3 source overwritten before the wait.
VD_KERNEL(32, 1) tma_store(const VD_GRID_CONST IoTma p) {
  VD_DYN_SMEM(smem);
  const auto bug = p.io.number[0];
  const uint32_t tile = aligned(smem);
  const auto put = [&](uint32_t v) {
    for (int i = 0; i < 8; ++i) arch::sts32(tile + 128 * i + 4 * threadIdx.x, v);
  };
  put(threadIdx.x);
  if (bug != 1) arch::fence_proxy_async();
  arch::syncwarp();
  if (threadIdx.x == 0) {
    arch::tma_store4(&p.store, tile, 0, 0, 0, 0);
    arch::tma_store_commit();
    if (bug == 3) arch::sts32(tile, 77);
    if (bug != 2) arch::tma_store_wait<0>();
  }
}

// number[0]: 1 the accumulator is read before the wait, 2 written before the wait, 3 no commit, 4 no wgmma fence,
// 5 no proxy fence, 6 A registers change in flight, 7 no wait at all, 8 descriptor beyond the pattern's first row,
// 9 the warps differ, 10 operand overwritten before the wait, 11 cp.async without a proxy fence.
VD_KERNEL(128, 1) wgmma(const VD_GRID_CONST Io io) {
  VD_DYN_SMEM(smem);
  const uint32_t base = aligned(smem);
  const auto bug = io.number[0];
  if (bug == 11) {
    arch::cp_async16(base + 16 * threadIdx.x, source(io), true);
    arch::cp_async_commit();
    arch::cp_async_wait<0>();
  } else {
    arch::sts128(base + 16 * threadIdx.x, arch::ldg128(source(io)));
    if (bug != 5) arch::fence_proxy_async();
  }
  arch::syncthreads();
  uint32_t a[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};  // ones
  float d[4] = {0, 0, 0, 0}, seen = 0;
  const uint32_t start = base + (bug == 8 ? 128 : bug == 9 ? 32 * (threadIdx.x / 32 % 2) : 0);
  if (bug != 4) arch::wgmma_fence();
  arch::wgmma_rs<arch::BF16, 0>(d, a, arch::wgmma_desc(start, 16, 1024, arch::SW_128), 1);
  if (bug != 3) arch::wgmma_commit();
  if (bug == 1) seen = d[0] * 0.f;
  if (bug == 2) d[1] = 1.f;
  if (bug == 6) a[2] = 0;
  if (bug == 10) arch::sts32(base + 16 * (threadIdx.x % 8), 0x7fc07fc0);
  if (bug != 7) arch::wgmma_wait<0>();
  for (int i = 0; i < 4; ++i) output<float>(io, 0)[threadIdx.x * 4 + i] = d[i] + seen;
}

// number[0]: 1 the consumers want more than there is, 2 decrease to more than the warp has, 3 one warp forgets.
VD_KERNEL(384, 1) register_trade(const VD_GRID_CONST Io io) {
  const auto bug = io.number[0];
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    if (bug == 2)
      arch::setmaxnreg_dec<200>();
    else if (bug == 1)
      arch::setmaxnreg_dec<32>();
    else if (bug != 3 || threadIdx.x >= 32)
      arch::setmaxnreg_dec<24>();
  } else {
    arch::setmaxnreg_inc<240>();
  }
}

}  // namespace vdit::selftest

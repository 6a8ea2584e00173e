#include "emulator/selftest/misuse.h"

#include "emulator/selftest/cases.h"

namespace vdit::selftest {
namespace {

// in[0] as 32 rows of 64 16-bit elements, loaded by 8 rows; number[1]: what is wrong with the map.
template <void (*Kernel)(IoTma), int Threads>
void run_tma(const Io& io) {
  const auto bug = io.number[1];
  const uint64_t dim[4] = {64, 32, 1, 1}, stride[3] = {bug == 1 ? 120u : 128u, 4096, 4096};
  const uint32_t box[4] = {bug == 2 ? 128u : bug == 3 ? 60u : 64u, bug == 4 ? 257u : 8u, 1, 1};
  const char* base = static_cast<const char*>(io.in[0]) + (bug == 5 ? 8 : 0);
  IoTma p{};
  p.io = io;
  arch::make_tensor_map(p.load, base, 2, 2, dim, stride, box);
  arch::make_tensor_map(p.store, io.out[0], 2, 4, dim, stride, box);
  if (bug == 6) p.load.rank = 3;
  arch::launch(Kernel, dim3(1), dim3(Threads), 2048, nullptr, p);
}

void bad_launch(const Io& io) {
  const auto bug = io.number[0];
  arch::launch(endless_loop, dim3(1, bug == 1 ? 65536 : 1), dim3(bug == 2 ? 1056 : 32), bug == 3 ? 228 * 1024 : 0,
               nullptr, Io{});
}

#define ONE_BLOCK(kernel, threads, smem) {#kernel, one_block<kernel, threads, smem>}

const Case kCases[] = {
    ONE_BLOCK(copy_not_waited_for, 32, 512),
    ONE_BLOCK(copy_wait_without_barrier, 64, 1024),
    ONE_BLOCK(copy_into_live_stage, 32, 1024),
    ONE_BLOCK(copy_left_in_flight, 32, 512),
    ONE_BLOCK(shared_out_of_bounds, 32, 512),
    ONE_BLOCK(shared_misaligned, 32, 512),
    ONE_BLOCK(global_out_of_bounds_read, 32, 0),
    ONE_BLOCK(global_out_of_bounds_write, 32, 0),
    ONE_BLOCK(global_write_to_input, 32, 0),
    ONE_BLOCK(global_misaligned, 32, 0),
    ONE_BLOCK(shuffle_in_divergent_branch, 32, 0),
    ONE_BLOCK(different_collectives, 32, 0),
    ONE_BLOCK(barrier_in_divergent_warp, 64, 0),
    ONE_BLOCK(barrier_missing_threads, 64, 0),
    ONE_BLOCK(barrier_counts_differ, 64, 0),
    ONE_BLOCK(barrier_left_half_arrived, 64, 0),
    ONE_BLOCK(endless_loop, 32, 0),
    ONE_BLOCK(endless_trading, 64, 0),
    ONE_BLOCK(mbar_never_initialised, 32, 0),
    ONE_BLOCK(mbar_overwritten, 32, 0),
    ONE_BLOCK(mbar_too_many_arrivals, 32, 0),
    ONE_BLOCK(wgmma, 128, 4096),
    ONE_BLOCK(register_trade, 384, 0),
    {"tma_pipeline", run_tma<tma_pipeline, 64>},
    {"tma_store", run_tma<tma_store, 32>},
    {"bad_launch", bad_launch},
    {nullptr, nullptr},
};
}  // namespace

const Case* misuse_cases() { return kCases; }

}  // namespace vdit::selftest

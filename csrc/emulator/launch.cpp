// Runs the blocks of a grid one after another (or one per OS thread), with fresh NaN-filled shared memory each.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "emulator/internal.h"

namespace emu {

Policy policy;

namespace {

Stats total;
constexpr uint32_t kWindow = (kSmemBase + kSmemMax + 4096 + 1023) / 1024 * 1024;
constexpr int kRegistersPerSm = 65536;

void add_stats(const Stats& part) {
  auto* to = reinterpret_cast<uint64_t*>(&total);
  const auto* from = reinterpret_cast<const uint64_t*>(&part);
  for (size_t i = 0; i < sizeof(Stats) / sizeof(uint64_t); ++i) to[i] += from[i];
}

void reset_block(Block& b, dim3 block) {
  const unsigned n = b.num_threads, warps = (n + 31) / 32;
  b.live = n;
  b.fibers.resize(n);
  b.warps.resize(warps);
  b.threads.resize(n);
  for (auto& warp : b.warps) warp.reset();
  for (auto& thread : b.threads) thread.reset();
  for (auto& barrier : b.barriers) {
    barrier.count = barrier.arrived = 0;
    barrier.per_warp.assign(warps, 0);
    barrier.waiters.clear();
  }
  b.mbars.clear();
  b.mbar_unfenced = false;
  b.mbar_waiters.clear();
  b.loads.clear();
  b.stores.clear();
  b.arrivals.clear();
  b.warpgroup_log.assign((warps + 3) / 4, {});
  b.wgmma_b.resize(16 * 256);
  b.statics.clear();
  b.error.clear();
  b.end = kSmemBase + policy.smem_skew + b.dyn_bytes;
  memset(b.smem, 0xff, b.end);
  b.writer.assign(kWindow / 16 + 1, 0);
  b.copied.clear();
  b.any_unfenced = false;
  // What a launch with these bounds gets: a multiple of 8 registers per thread, at most 256 with the reserved ones.
  const int registers = std::min(256, kRegistersPerSm / int(std::max(n, 1u)) / 8 * 8);
  b.register_pool = registers * int(warps);
  for (auto& warp : b.warps) warp.registers = warp.registers_wanted = registers;
  for (unsigned i = 0; i < n; ++i) {
    Fiber& f = b.fibers[i];
    f = Fiber{};
    f.linear = i;
    f.lane = i % 32;
    f.warp = i / 32;
    f.tid = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    f.state = Fiber::Ready;
    f.wait_kind = "start";
    b.warps[f.warp].ready |= 1u << f.lane;
  }
}

void check_launch(dim3 grid, dim3 block, size_t smem) {  // CUDA programming guide, technical specifications
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024)
    throw Error("launch: " + std::to_string(threads) + " threads in a block; 1 to 1024 are possible");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Error("launch: grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
                std::to_string(grid.z) + "; 1 to 2147483647 x 65535 x 65535 are possible");
  if (smem > kSmemMax)
    throw Error("launch: " + std::to_string(smem) + " bytes of dynamic shared memory; " + std::to_string(kSmemMax) +
                " are possible");
}

}  // namespace

Stats& stats() { return total; }

void Thread::reset() {
  copies.clear();
  copies_issued = copies_done = copies_promised = 0;
  copy_groups.clear();
  unfenced.clear();
  stores.clear();
  store_groups.clear();
}

void Warp::reset() {
  ready = done = 0;
  for (auto& c : collective) c = Collective{};
  wgmmas.clear();
  for (auto& accumulator : accumulators) accumulator.live = false;
  issued = executed = 0;
  groups.clear();
  fenced = false;
}

void launch_blocks(dim3 grid, dim3 block, size_t smem, void (*body)(void*), void* context) {
  check_launch(grid, block, smem);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::string error;
  auto worker = [&] {
    static thread_local unsigned char* window = nullptr;
    if (window == nullptr) window = static_cast<unsigned char*>(aligned_alloc(1024, kWindow));
    Watch watch;
    Block b{};
    b.num_threads = block.x * block.y * block.z;
    b.dyn_bytes = uint32_t(smem);
    b.smem = window;
    b.body = body;
    b.context = context;
    block_dim = {block.x, block.y, block.z};
    grid_dim = {grid.x, grid.y, grid.z};
    for (uint64_t i; (i = next++) < blocks;) {
      block_idx = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
      b.random = (policy.seed * 0x9E3779B97F4A7C15ull ^ i * 0xD1B54A32D192ED03ull) | 1;
      reset_block(b, block);
      blk = &b;
      enter_block();
      if (b.error.empty()) b.error = left_at_block_exit();
      blk = nullptr;
      ++b.stats.blocks;
      if (!b.error.empty()) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (error.empty()) error = b.error;
        next = blocks;
        break;
      }
    }
    const std::lock_guard<std::mutex> lock(mutex);
    add_stats(b.stats);
  };
  if (policy.threads <= 1) {
    worker();
  } else {
    std::vector<std::thread> workers;
    workers.reserve(policy.threads);
    for (int i = 0; i < policy.threads; ++i) workers.emplace_back(worker);
    for (auto& w : workers) w.join();
  }
  if (!error.empty()) throw Error(error);
}

}  // namespace emu

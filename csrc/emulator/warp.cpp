// Warp collectives, named barriers and the register pool.
#include "emulator/internal.h"

namespace emu {

void warp_collective(const char* kind, uint32_t mask, void* operand, void (*fn)(void**, uint32_t)) {
  Warp& warp = this_warp();
  const uint32_t bit = 1u << cur->lane;
  if (!(mask & bit)) fail("%s: the calling lane is not in mask %08x", kind, mask);
  Collective* c = nullptr;
  for (auto& open : warp.collective) {
    if (open.arrived && (open.mask & mask)) {
      c = &open;
      break;
    }
  }
  if (c != nullptr && (c->mask != mask || (c->kind != kind && strcmp(c->kind, kind) != 0)))
    fail("divergent warp collective: this lane is at %s of %08x, others at %s of %08x", kind, mask, c->kind, c->mask);
  if (c == nullptr) {
    for (auto& open : warp.collective) {
      if (!open.arrived) {
        c = &open;
        break;
      }
    }
    c->mask = mask;
    c->kind = kind;
  }
  if (mask & warp.done) fail("%s: mask %08x names lanes that have exited (%08x)", kind, mask, warp.done);
  const unsigned first = cur->warp * 32;
  const unsigned missing = blk->num_threads - first;
  if (missing < 32 && mask >> missing) fail("%s: mask %08x names lanes beyond the block", kind, mask);
  cur->operand = operand;
  c->arrived |= bit;
  if (c->arrived != mask) {
    block_current(kind, mask);
    cur->operand = nullptr;
    return;
  }
  ++blk->stats.collectives;
  c->arrived = 0;
  Fiber* lanes = &blk->fibers[first];
  if (fn != nullptr) {
    void* operands[32];
    for (int i = 0; i < 32; ++i) operands[i] = mask >> i & 1 ? lanes[i].operand : nullptr;
    fn(operands, mask);
  }
  for (int i = 0; i < 32; ++i)
    if ((mask >> i & 1) && &lanes[i] != cur) wake(&lanes[i]);
  cur->operand = nullptr;
}

namespace {

struct Exchange {
  uint32_t value, result;
  int argument;
};

void exchange(void** operands, uint32_t mask, int (*source)(int lane, int argument)) {
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    auto* own = static_cast<Exchange*>(operands[i]);
    const int from = source(i, own->argument);
    if (from < 0 || from > 31 || !(mask >> from & 1))
      fail("shfl reads lane %d, which is outside mask %08x", from, mask);
    own->result = static_cast<Exchange*>(operands[from])->value;
  }
}

}  // namespace

uint32_t shfl_xor(uint32_t mask, uint32_t value, int lane_mask) {
  Exchange x{value, 0, lane_mask};
  warp_collective("shfl.bfly", mask, &x,
                  [](void** p, uint32_t m) { exchange(p, m, [](int lane, int a) { return lane ^ a; }); });
  return x.result;
}

uint32_t shfl_idx(uint32_t mask, uint32_t value, int lane) {
  Exchange x{value, 0, lane};
  warp_collective("shfl.idx", mask, &x,
                  [](void** p, uint32_t m) { exchange(p, m, [](int, int a) { return a & 31; }); });
  return x.result;
}

uint32_t ballot(uint32_t mask, bool p) {
  Exchange x{p, 0, 0};
  warp_collective("vote.ballot", mask, &x, [](void** operands, uint32_t m) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i)
      if ((m >> i & 1) && static_cast<Exchange*>(operands[i])->value) votes |= 1u << i;
    for (int i = 0; i < 32; ++i)
      if (m >> i & 1) static_cast<Exchange*>(operands[i])->result = votes;
  });
  return x.result;
}

uint32_t match_any(uint32_t mask, uint32_t value) {
  Exchange x{value, 0, 0};
  warp_collective("match.any", mask, &x, [](void** operands, uint32_t m) {
    for (int i = 0; i < 32; ++i) {
      if ((m >> i & 1) == 0) continue;
      auto* own = static_cast<Exchange*>(operands[i]);
      own->result = 0;
      for (int j = 0; j < 32; ++j)
        if ((m >> j & 1) && static_cast<Exchange*>(operands[j])->value == own->value) own->result |= 1u << j;
    }
  });
  return x.result;
}

bool elect_one() {
  warp_collective("elect.sync", ~0u, nullptr, nullptr);
  return cur->lane == 0;
}

// ---- named barriers: PTX ISA "bar, barrier". The wrappers use the .aligned forms, so warps arrive whole.

namespace {

void complete_barrier(unsigned id) {
  NamedBarrier& b = blk->barriers[id];
  const unsigned needed = b.count ? b.count : blk->live;
  if (b.arrived == 0 || b.arrived < needed) return;
  if (b.arrived > needed) fail("barrier %u: %u threads arrived, its count is %u", id, b.arrived, needed);
  for (size_t w = 0; w < b.per_warp.size(); ++w) {
    const uint32_t exited = blk->warps[w].done;
    const unsigned size = w * 32 + 32 <= blk->num_threads ? 32 : blk->num_threads % 32;
    const unsigned live = size - unsigned(__builtin_popcount(exited));
    if (live && b.per_warp[w] % live)
      fail("barrier %u completed with %u arrivals of warp %zu, which has %u threads: bar.sync in a divergent branch",
           id, b.per_warp[w], w, live);
    b.per_warp[w] = 0;
  }
  b.arrived = b.count = 0;
  std::vector<Fiber*> waiters;
  waiters.swap(b.waiters);
  for (Fiber* f : waiters) wake(f);
}

NamedBarrier& arrive_at(unsigned id, unsigned count) {
  if (id > 15) fail("barrier id %u; there are 16", id);
  if (count % 32) fail("barrier %u: count %u is not a multiple of 32", id, count);
  NamedBarrier& b = blk->barriers[id];
  if (b.arrived && b.count != count) fail("barrier %u: count %u, earlier arrivals said %u", id, count, b.count);
  b.count = count;
  ++b.arrived;
  ++b.per_warp[cur->warp];
  return b;
}

}  // namespace

void bar_sync(unsigned id, unsigned count, const char* who) {
  NamedBarrier& b = arrive_at(id, count);
  if (b.arrived >= (count ? count : blk->live)) {
    complete_barrier(id);
    if (policy.preempt) yield();
    return;
  }
  b.waiters.push_back(cur);
  block_current(who, id, count);
}

void bar_arrive(unsigned id, unsigned count) {
  arrive_at(id, count);
  complete_barrier(id);
  if (policy.preempt && cur->lane == 31) yield();
}

void release_barriers_of_exited() {
  for (unsigned id = 0; id < 16; ++id)
    if (blk->barriers[id].arrived && !blk->barriers[id].count) complete_barrier(id);
}

// ---- setmaxnreg: PTX ISA "setmaxnreg". Registers come from a pool of what the launch gave the block; an increase
// waits until decreases have put enough into it.

namespace {

int free_registers() {
  int free = blk->register_pool;
  for (const auto& warp : blk->warps) free -= warp.registers;
  return free;
}

void grant_registers() {
  for (size_t w = 0; w < blk->warps.size(); ++w) {
    Warp& warp = blk->warps[w];
    const int more = warp.registers_wanted - warp.registers;
    if (more <= 0 || more > free_registers()) continue;
    warp.registers = warp.registers_wanted;
    for (unsigned lane = 0; lane < 32 && w * 32 + lane < blk->num_threads; ++lane) {
      Fiber& f = blk->fibers[w * 32 + lane];
      if (f.state == Fiber::Blocked && strcmp(f.wait_kind, "setmaxnreg.inc") == 0) wake(&f);
    }
  }
}

}  // namespace

// NOLINTBEGIN(clang-analyzer-core.StackAddressEscape): nobody reads a collective's operands after it
void setmaxnreg(int registers, bool increase) {
  int wanted = registers;
  warp_collective(increase ? "setmaxnreg.inc." : "setmaxnreg.dec", ~0u, &wanted,
                  [](void** p, uint32_t) { this_warp().registers_wanted = *static_cast<int*>(p[0]); });
  Warp& warp = this_warp();
  if (increase ? registers < warp.registers : registers > warp.registers)
    fail("setmaxnreg.%s to %d, but the warp has %d registers per thread", increase ? "inc" : "dec", registers,
         warp.registers);
  if (!increase) {
    warp.registers = registers;
    grant_registers();
    return;
  }
  grant_registers();
  while (warp.registers != registers) block_current("setmaxnreg.inc", uint32_t(registers));
}
// NOLINTEND(clang-analyzer-core.StackAddressEscape)

std::string left_at_block_exit() {
  for (unsigned id = 0; id < 16; ++id)
    if (blk->barriers[id].arrived)
      return "block exits with named barrier " + std::to_string(id) + " half arrived (" +
             std::to_string(blk->barriers[id].arrived) + " threads)";
  if (!blk->loads.empty()) return "block exits with TMA loads in flight";
  if (!blk->arrivals.empty()) return "block exits with cp.async.mbarrier.arrive in flight";
  for (size_t w = 0; w < blk->warps.size(); ++w) {
    const Warp& warp = blk->warps[w];
    if (warp.executed != warp.issued) return "warp " + std::to_string(w) + " exits with wgmma in flight";
    if (warp.registers != blk->warps[w / 4 * 4].registers)
      return "the warps of warpgroup " + std::to_string(w / 4) + " left setmaxnreg with different numbers of registers";
  }
  return "";
}

}  // namespace emu

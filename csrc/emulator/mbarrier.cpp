// mbarrier: PTX ISA "mbarrier". The object lives in its 8 bytes of shared memory, so that overwriting it is noticed:
// pending count 20 bits, expected count 20, transaction count 21 (signed), phase 1, tag 2.
#include <algorithm>
#include <cstdio>

#include "emulator/internal.h"

namespace emu {

namespace {

constexpr uint32_t kMaxCount = (1u << 20) - 1;
constexpr uint64_t kTag = 1;

struct Mbar {
  uint32_t pending, expected;
  int32_t tx;
  uint32_t phase;
};

bool decode(uint64_t bits, Mbar& m) {
  m.pending = bits & kMaxCount;
  m.expected = bits >> 20 & kMaxCount;
  m.tx = int32_t(uint32_t(bits >> 40 & 0x1fffff) << 11) >> 11;
  m.phase = bits >> 61 & 1;
  return bits >> 62 == kTag;
}

bool known(uint32_t bar) { return std::find(blk->mbars.begin(), blk->mbars.end(), bar) != blk->mbars.end(); }

Mbar read(uint32_t bar, const char* who) {
  uint64_t bits;
  memcpy(&bits, smem_at(bar, 8, 8, who), 8);
  Mbar m;
  if (!decode(bits, m) || !known(bar)) fail("%s: there is no initialised mbarrier at shared 0x%x", who, bar);
  return m;
}

void write(uint32_t bar, const Mbar& m) {
  const uint64_t bits =
      m.pending | uint64_t(m.expected) << 20 | uint64_t(m.tx & 0x1fffff) << 40 | uint64_t(m.phase) << 61 | kTag << 62;
  memcpy(blk->smem + bar, &bits, 8);
}

// Stores the new state; the phase completes when neither arrivals nor bytes are outstanding.
void settle(uint32_t bar, Mbar m, bool may_yield) {
  if (m.pending || m.tx) {
    write(bar, m);
    return;
  }
  m.phase ^= 1;
  m.pending = m.expected;
  write(bar, m);
  bool woke = false;
  auto& waiters = blk->mbar_waiters;
  for (size_t i = 0; i < waiters.size();) {
    if (waiters[i].bar == bar && waiters[i].parity != m.phase) {
      wake(waiters[i].fiber);
      woke = true;
      waiters[i] = waiters.back();
      waiters.pop_back();
    } else {
      ++i;
    }
  }
  if (woke && may_yield && (policy.preempt || (policy.order == kAnyOrder && (random_bits() & 1)))) yield();
}

void arrive(uint32_t bar, uint32_t n, bool may_yield, const char* who) {
  Mbar m = read(bar, who);
  if (m.pending < n)
    fail("%s on the mbarrier at shared 0x%x: more arrivals than its count %u in this phase", who, bar, m.expected);
  m.pending -= n;
  settle(bar, m, may_yield);
}

}  // namespace

std::string mbar_describe(uint32_t bar) {
  uint64_t bits;
  memcpy(&bits, blk->smem + bar, 8);
  Mbar m;
  decode(bits, m);
  char text[120];
  snprintf(text, sizeof text, "0x%x [phase %u, %u of %u arrivals pending, %d bytes pending]", bar, m.phase, m.pending,
           m.expected, m.tx);
  return text;
}

void mbar_init(uint32_t bar, uint32_t count) {
  smem_at(bar, 8, 8, "mbarrier.init");
  if (count == 0 || count > kMaxCount) fail("mbarrier.init with count %u; 1 to %u are possible", count, kMaxCount);
  if (known(bar)) fail("mbarrier.init on the mbarrier at shared 0x%x, which is in use", bar);
  write(bar, {count, count, 0, 0});
  blk->mbars.push_back(bar);
  blk->mbar_unfenced = true;
}

void fence_mbar_init() { blk->mbar_unfenced = false; }

void check_mbar_usable(uint32_t bar, const char* who) {
  read(bar, who);
  if (blk->mbar_unfenced) fail("%s uses an mbarrier whose init no fence.mbarrier_init followed", who);
}

void mbar_arrive(uint32_t bar, uint32_t n) { arrive(bar, n, true, "mbarrier.arrive"); }

void mbar_expect_tx(uint32_t bar, uint32_t bytes) {
  Mbar m = read(bar, "mbarrier.expect_tx");
  m.tx += int32_t(bytes);
  if (m.tx > int32_t(kMaxCount)) fail("mbarrier.expect_tx: more than %u bytes pending", kMaxCount);
  write(bar, m);
}

void mbar_complete_tx(uint32_t bar, uint32_t bytes) {
  Mbar m = read(bar, "complete_tx");
  m.tx -= int32_t(bytes);
  settle(bar, m, false);
}

void mbar_wait(uint32_t bar, uint32_t parity) {
  parity &= 1;
  while (read(bar, "mbarrier wait").phase == parity) {
    blk->mbar_waiters.push_back({cur, bar, parity});
    block_current("mbarrier wait", bar, parity);
  }
}

// PTX ISA "cp.async.mbarrier.arrive": with .noinc the arrival counts against the number given at init.
void cp_async_mbar_arrive_noinc(uint32_t bar) {
  check_mbar_usable(bar, "cp.async.mbarrier.arrive");
  Thread& thread = this_thread();
  thread.copies_promised = thread.copies_issued;
  if (policy.async == kEager) {
    land_copies(thread, thread.copies_issued);
    arrive(bar, 1, true, "cp.async.mbarrier.arrive");
    return;
  }
  blk->arrivals.push({cur->linear, thread.copies_issued, bar});
}

void mbar_arrive_async(uint32_t bar) { arrive(bar, 1, false, "cp.async.mbarrier.arrive"); }

}  // namespace emu

// Forward attention for Hopper: what producer and consumers share. docs/kernels/attention_sm90a.md has the drawings.
//
// A CTA runs 128 query rows of one work item against a stream of keys: the runs of its tile, then the segments, 128 key
// slots to a stage. Warpgroup 0 fills the stages, warpgroups 1 and 2 compute. K and V have kStages stages each.
#pragma once
#include "arch/arch.h"
#include "kernels/attention/forward.h"
#include "kernels/attention/work.h"

namespace vdit::gpu::sm90a {

constexpr int kRows = 128;  // query rows of an item
constexpr int kKeys = 128;  // key slots of a stage
constexpr int kStages = 2;
constexpr int kThreads = 384;

// gather: any row positions, by cp.async of 128 threads. tma: boxes of rows, by one warp.
enum class Producer { gather, tma };

// Per thread of the producer and the consumer warpgroups: (a + 2 * b) * 128 <= 65536, and no more than the 168 * 3 that
// the CTA starts with.
template <Producer>
struct Registers {
  static constexpr int kProducing = 96, kConsuming = 200;
};
template <>
struct Registers<Producer::tma> {
  static constexpr int kProducing = 56, kConsuming = 224;
};

constexpr int kBoxes = 5;  // heights of the TMA boxes: 128, 64, 32, 16, 8 rows

struct KeyMaps {
  arch::TensorMap k[kBoxes], v[kBoxes];
};

struct KernelParams {
  KeyMaps maps;  // tma only
  ForwardArgs args;
  float pre_scale;   // 1, or -1 or 0 for a negative or zero scale: what scores are multiplied with before the maximum
  float scale_log2;  // |scale| * log2(e), or 1 for a zero scale
};

static_assert(sizeof(KernelParams) <= 4096, "CUDA kernel arguments are limited to 4 KB");

// Bytes from the start of dynamic shared memory, aligned by hand to 1024 (the 128-byte swizzle pattern).
// Tiles are 64-column panels of 128 rows x 128 bytes, swizzled as wgmma wants them.
template <int kDim>
struct Smem {
  static constexpr uint32_t kPanels = kDim / 64;
  static constexpr uint32_t kPanelBytes = 128 * 128;
  static constexpr uint32_t kTileBytes = kPanels * kPanelBytes;
  static constexpr uint32_t kQ = 0;
  static constexpr uint32_t kK = kQ + kTileBytes;
  static constexpr uint32_t kV = kK + kStages * kTileBytes;
  static constexpr uint32_t kBlocked = kV + kStages * kTileBytes;  // per stage and row: 128 bits, 1 = not read
  static constexpr uint32_t kBlockedBytes = kRows * 16;
  static constexpr uint32_t kRecord = kBlocked + kStages * kBlockedBytes;  // per stage: StageRecord
  static constexpr uint32_t kRecordBytes = 32;
  static constexpr uint32_t kBarriers = kRecord + kStages * kRecordBytes;
  static constexpr uint32_t kBytes = kBarriers + (1 + 4 * kStages) * 8;
  static constexpr uint32_t kLaunchBytes = kBytes + 1024;
};

// StageRecord: 128 bits, 1 = the slot holds a key that is read; then one word of these flags. Belongs to the K stage.
constexpr uint32_t kEnd = 1;      // no keys in this stage and none after it
constexpr uint32_t kBlocks = 2;   // some rows do not read some slots: look at kBlocked
constexpr uint32_t kGeneric = 4;  // rows were written by cp.async (generic proxy), not by TMA alone

struct Barriers {
  uint32_t q_full, base;
  VD_METHOD uint32_t k_full(int stage) const { return base + 8 * stage; }
  VD_METHOD uint32_t k_empty(int stage) const { return base + 8 * (kStages + stage); }
  VD_METHOD uint32_t v_full(int stage) const { return base + 8 * (2 * kStages + stage); }
  VD_METHOD uint32_t v_empty(int stage) const { return base + 8 * (3 * kStages + stage); }
};

template <int kDim>
VD_DEV Barriers barriers(uint32_t smem) {
  return {smem + Smem<kDim>::kBarriers, smem + Smem<kDim>::kBarriers + 8};
}

// Items of at most 64 rows give the warpgroups alternate stages of the same rows, larger ones different rows of the
// same stages.
static_assert(kStages == 2, "alternating warpgroups own one stage each");
VD_DEV bool alternates(const Item& item) { return item.rows <= 64; }

VD_DEV int min_int(int a, int b) { return a < b ? a : b; }
VD_DEV int max_int(int a, int b) { return a > b ? a : b; }

}  // namespace vdit::gpu::sm90a

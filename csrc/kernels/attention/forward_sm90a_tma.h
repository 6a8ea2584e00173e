// The TMA producer: for keys in their original order without mask bits. One warp cuts the keys of a stage into pieces
// that begin at multiples of 8 slots (the swizzle pattern) and loads each as one box of 128, 64, 32, 16 or 8 rows. The
// last rows of a run that are not a whole box, and segments, are copied by cp.async, so a row that is not read is never
// in a stage. Slots without a key hold zeros: boxes beyond the last row.
#pragma once
#include "kernels/attention/forward_sm90a_producer.h"

namespace vdit::gpu::sm90a {

// The pieces of one stage: lane i holds piece i.
struct Pieces {
  int count;
  int slot, slots;  // the piece's place in the stage
  int position;     // first key, or p.lk for zeros
  int keys;         // <= slots
  int box;          // -1: by cp.async
  int segment;
  uint32_t valid;     // word `lane % 4` of the record
  uint32_t box_rows;  // of all pieces
  bool generic;       // some piece goes by cp.async
};

VD_DEV Pieces cut(KeyWalk& walk) {
  const AttentionParams& p = walk.p;
  Pieces all{};
  for (int filled = 0; filled < kKeys; ++all.count) {
    int n = min_int(walk.left, kKeys - filled), slots, box = 0;
    if (n == 0) {
      while ((128 >> box) > kKeys - filled) ++box;
      slots = 128 >> box;
    } else if (walk.segment < 0 && n >= 8) {
      while ((128 >> box) > n) ++box;
      n = slots = 128 >> box;
    } else if (walk.segment < 0 && walk.position + n == p.lk) {  // the box ends beyond the last row
      box = kBoxes - 1;
      slots = 8;
    } else {
      box = -1;
      slots = (n + 7) / 8 * 8;
      all.generic = true;
    }
    if (walk.lane == all.count) {
      all.slot = filled;
      all.slots = slots;
      all.position = n == 0 ? p.lk : walk.position;
      all.keys = n;
      all.box = box;
      all.segment = walk.segment;
    }
    if (box >= 0) all.box_rows += slots;
    const int word = walk.lane % 4 * 32, lo = max_int(filled, word), hi = min_int(filled + n, word + 32);
    if (lo < hi) all.valid |= (hi - lo == 32 ? ~0u : (1u << (hi - lo)) - 1) << (lo - word);
    filled += slots;
    if (n > 0) walk.advance(n);
  }
  return all;
}

// One tile, by one warp: 32 arrivals for the rows by cp.async, one for the boxes.
template <int kDim>
VD_DEV void load_pieces(const AttentionParams& p, const Rows& main, bool value, const arch::TensorMap* maps,
                        const Pieces& all, int batch, int kv_head, uint32_t tile, uint32_t full) {
  using S = Smem<kDim>;
  const int lane = threadIdx.x % 32;
  if (lane == 0) arch::mbar_arrive_tx(full, all.box_rows * 128 * S::kPanels);
  arch::syncwarp();
  if (lane < all.count && all.box >= 0) {
    VD_UNROLL for (int i = 0; i < int(S::kPanels); ++i) {
      arch::tma_load4(tile + i * S::kPanelBytes + all.slot * 128, maps + all.box, full, 64 * i, all.position, kv_head,
                      batch);
    }
  }
  if (all.generic) {
    constexpr int kChunks = kDim / 8;
    const int chunk = lane % kChunks;
    for (int i = 0; i < all.count; ++i) {
      if (int(arch::shfl(all.box, i)) >= 0) continue;
      const int slot = int(arch::shfl(all.slot, i)), slots = int(arch::shfl(all.slots, i));
      const int position = int(arch::shfl(all.position, i)), keys = int(arch::shfl(all.keys, i));
      const int segment = int(arch::shfl(all.segment, i));
      const Rows& rows = segment < 0 ? main : value ? p.segment[segment].v : p.segment[segment].k;
      for (int r = lane / kChunks; r < slots; r += 32 / kChunks) {
        const bool there = r < keys && chunk * 8 < p.dim;
        const void* from = there ? row_pointer(rows, batch, kv_head, position + r, 2) + chunk * 16 : p.q.data;
        arch::cp_async16(tile + (chunk / 8) * S::kPanelBytes + (slot + r) * 128 + ((chunk ^ r) % 8) * 16, from, there);
      }
    }
  }
  arch::cp_async_mbar_arrive_noinc(full);
}

// By all 128 threads for Q, then by one warp.
template <int kDim>
VD_DEV void produce_tma(const KeyMaps& maps, const AttentionParams& p, const Item& item, int split, int splits,
                        uint32_t smem, const Barriers& bars) {
  using S = Smem<kDim>;
  load_queries<kDim>(p, item, smem, bars);
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x, kv_head = item.head / (p.heads / p.kv_heads);
  if (lane < kBoxes) {
    arch::tma_prefetch(maps.k + lane);
    arch::tma_prefetch(maps.v + lane);
  }
  KeyWalk walk(p, item);
  for (int i = 0; i < split; ++i) walk.skip_stage(8);
  int ends = alternates(item) ? 2 : 1;
  for (int j = 0; ends > 0; ++j) {
    const int stage = j % kStages, phase = (j / kStages) & 1;
    const uint32_t record = smem + S::kRecord + stage * S::kRecordBytes;
    if (walk.left == 0) {
      arch::mbar_wait(bars.k_empty(stage), phase ^ 1);
      if (lane == 0) {
        arch::sts32(record + 16, kEnd);
        arch::mbar_arrive(bars.k_full(stage));
      }
      arch::cp_async_mbar_arrive_noinc(bars.k_full(stage));
      --ends;
      continue;
    }
    const Pieces all = cut(walk);
    for (int i = 1; i < splits; ++i) walk.skip_stage(8);

    arch::mbar_wait(bars.k_empty(stage), phase ^ 1);
    if (lane < 4) arch::sts32(record + 4 * lane, all.valid);
    if (lane == 0) arch::sts32(record + 16, all.generic ? kGeneric : 0);
    arch::syncwarp();
    load_pieces<kDim>(p, p.k, false, maps.k, all, item.batch, kv_head, smem + S::kK + stage * S::kTileBytes,
                      bars.k_full(stage));
    arch::mbar_wait(bars.v_empty(stage), phase ^ 1);
    load_pieces<kDim>(p, p.v, true, maps.v, all, item.batch, kv_head, smem + S::kV + stage * S::kTileBytes,
                      bars.v_full(stage));
  }
}

}  // namespace vdit::gpu::sm90a

// The query rows that read a block of keys, in blocks of kRows rows of one tile: for each batch item and query head the
// CTA sums over, the tiles with a run that meets the block, in the order of the plan. All threads run this code with
// the same numbers.
#pragma once
#include "kernels/attention/backward_tile.h"

namespace vdit::gpu::backward {

// 64 keys of the main sequence (permuted positions) or of a segment, and the queries whose gradients are summed.
struct KeyBlock {
  int32_t segment;  // -1: the main sequence
  int32_t first;    // its first key
  int32_t length;   // keys of the sequence
  int32_t batch, batches, head, heads;
  int32_t kv_head;
};

VD_DEV int32_t blocks_of(int32_t keys) { return (keys + kBlockKeys - 1) / kBlockKeys; }

VD_DEV KeyBlock locate_keys(const BackwardArgs& a, int64_t index) {
  const AttentionParams& p = a.params;
  KeyBlock b{};
  b.heads = p.heads / p.kv_heads;
  for (b.segment = 0; b.segment < p.num_segments; ++b.segment) {
    b.length = p.segment[b.segment].length;
    const int64_t blocks = blocks_of(b.length), batch = a.grads.segment_batch[b.segment];
    if (index < batch * p.kv_heads * blocks) {
      b.first = int32_t(index % blocks) * kBlockKeys;
      b.kv_head = int32_t(index / blocks % p.kv_heads);
      b.head = b.kv_head * b.heads;
      b.batch = int32_t(index / blocks / p.kv_heads);
      b.batches = batch == 1 ? p.batch : 1;
      return b;
    }
    index -= batch * p.kv_heads * blocks;
  }
  b.segment = -1;
  b.length = p.lk;
  b.heads = a.heads_per_block;
  const int64_t blocks = blocks_of(p.lk), groups = p.heads / b.heads;
  b.first = int32_t(index % blocks) * kBlockKeys;
  b.head = int32_t(index / blocks % groups) * b.heads;
  b.kv_head = b.head / (p.heads / p.kv_heads);
  b.batch = int32_t(index / blocks / groups);
  b.batches = 1;
  return b;
}

struct QueryBlock {
  int32_t batch, head;
  int32_t start, first, rows;  // permuted position of its first row, number of that row in the tile
  int32_t run, run_end;        // of the tile, from the first that meets the keys on
  bool full;                   // every row reads every key
};

// Bits of the 32 keys from position `key` on that row `row` of a tile reads.
VD_DEV uint32_t readable_keys(const AttentionParams& p, const QueryBlock& q, int64_t row, int32_t key) {
  uint32_t bits = 0;
  for (int64_t r = q.run; r < q.run_end; ++r) {
    const int32_t start = p.plan.runs[3 * r], all = p.plan.runs[3 * r + 1], mask = p.plan.runs[3 * r + 2];
    if (start >= key + 32) break;
    const int32_t end = start + sm80::run_length(start, all, p.lk);
    const int32_t from = start > key ? start : key, to = end < key + 32 ? end : key + 32;
    if (from >= to) continue;
    const uint32_t range = (to - from == 32 ? ~0u : (1u << (to - from)) - 1) << (from - key);
    uint64_t value = ~uint64_t(0);
    const int shift = (from - start) % 32;
    if (mask >= 0) {
      const int64_t at = mask + row * ((int64_t(all) + 31) / 32) + (from - start) / 32;
      value = at < p.plan.num_mask_words ? uint32_t(p.plan.mask_bits[at]) : 0;
      if (shift + (to - from) > 32 && at + 1 < p.plan.num_mask_words)
        value |= uint64_t(uint32_t(p.plan.mask_bits[at + 1])) << 32;
    }
    bits |= uint32_t(value >> shift) << (from - key) & range;
  }
  return bits;
}

template <int kRows>
struct QueryStream {
  static constexpr int kBytes = kThreads * 16 + kThreads / 32 * 4;
  uint32_t matches;  // in shared memory: found tiles, {start, rows | full << 31, run, run_end}, then a count per warp
  int32_t batch, head;
  int32_t tile, tile_end;  // of by_head, not looked at yet
  int32_t match, count;    // of the found ones
  int32_t row;             // next row of the tile; dense: of the sequence

  VD_METHOD QueryStream(const BackwardArgs& a, const KeyBlock& keys, uint32_t at) {
    matches = at;
    batch = keys.batch;
    head = keys.head;
    enter(a, keys);
  }
  VD_METHOD void enter(const BackwardArgs& a, const KeyBlock& keys) {
    const Plan& plan = a.params.plan;
    tile = tile_end = match = count = row = 0;
    if (dense(a, keys) || batch >= keys.batch + keys.batches) return;
    const int32_t index = (plan.batch == 1 ? 0 : batch) * plan.heads + (plan.heads == 1 ? 0 : head);
    tile = a.head_ptr[index];
    tile_end = a.head_ptr[index + 1];
  }
  VD_STATIC_METHOD bool dense(const BackwardArgs& a, const KeyBlock& keys) {
    return keys.segment >= 0 || a.params.plan.tiles == nullptr;
  }

  // Returns false at the end. May contain barriers.
  VD_METHOD bool next(const BackwardArgs& a, const KeyBlock& keys, QueryBlock& q) {
    while (batch < keys.batch + keys.batches) {
      q.batch = batch;
      q.head = head;
      if (dense(a, keys)) {
        if (row < a.params.lq) {
          q.start = q.first = row;
          q.full = true;
          take(a.params.lq, q);
          return true;
        }
      } else if (match < count) {
        const uint4 m = arch::lds128(matches + match * 16);
        const int32_t rows = int32_t(m.y & 0x7fffffffu);
        if (row < rows) {
          q.start = int32_t(m.x) + row;
          q.first = row;
          q.run = int32_t(m.z);
          q.run_end = int32_t(m.w);
          q.full = m.y >> 31 != 0;
          take(rows, q);
          return true;
        }
        ++match;
        row = 0;
        continue;
      } else if (tile < tile_end) {
        find(a, keys);
        continue;
      }
      if (++head == keys.head + keys.heads) {
        head = keys.head;
        ++batch;
      }
      enter(a, keys);
    }
    return false;
  }
  VD_METHOD void take(int32_t rows, QueryBlock& q) {
    q.rows = rows - row < kRows ? rows - row : kRows;
    row += kRows;
  }
  // Looks at the next kThreads tiles of the head, one per thread.
  VD_METHOD void find(const BackwardArgs& a, const KeyBlock& keys) {
    const AttentionParams& p = a.params;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t counts = matches + kThreads * 16;
    const int64_t at = tile + int64_t(threadIdx.x);
    uint4 found{};
    bool hit = false;
    if (at < tile_end) {
      const int32_t t = a.by_head[at];
      const TileRows rows = load_tile(p.plan, p.lq, t);
      const int32_t begin = sm80::clamp_int(p.plan.run_ptr[t], 0, p.plan.num_runs);
      const int32_t end = sm80::clamp_int(p.plan.run_ptr[t + 1], begin, p.plan.num_runs);
      int64_t low = begin, high = end;  // the first run that ends behind the first key
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        const int64_t run_end = int64_t(p.plan.runs[3 * middle]) + p.plan.runs[3 * middle + 1];
        if (run_end <= keys.first) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (low < end) {
        const int64_t start = p.plan.runs[3 * low], run_end = start + p.plan.runs[3 * low + 1];
        const int32_t last = keys.first + kBlockKeys < keys.length ? keys.first + kBlockKeys : keys.length;
        hit = start < last;
        const bool full = start >= 0 && start <= keys.first && run_end >= last && p.plan.runs[3 * low + 2] < 0;
        found = {uint32_t(rows.start), uint32_t(rows.rows) | uint32_t(full) << 31, uint32_t(low), uint32_t(end)};
      }
    }
    const uint32_t hits = arch::vote_ballot(hit);
    if (lane == 0) arch::sts32(counts + warp * 4, uint32_t(arch::popc(hits)));
    arch::syncthreads();  // all have read the list for the last time
    count = 0;
    int32_t before = 0;
    VD_UNROLL for (int w = 0; w < kThreads / 32; ++w) {
      if (w == warp) before = count;
      count += int32_t(arch::lds32(counts + w * 4));
    }
    if (hit) arch::sts128(matches + (before + arch::popc(hits & ((1u << lane) - 1))) * 16, found);
    arch::syncthreads();
    tile = tile_end - tile < kThreads ? tile_end : tile + kThreads;
    match = row = 0;
  }
};

}  // namespace vdit::gpu::backward

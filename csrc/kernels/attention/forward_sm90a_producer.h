// The producer warpgroup: walks the keys of a work item and copies them into the stages.
#pragma once
#include "kernels/attention/forward_sm90a_stage.h"

namespace vdit::gpu::sm90a {

// The keys of an item in pieces of consecutive positions: the runs of its tile, then the segments. All lanes of a warp
// hold the same state, but for the runs: they are fetched 32 at a time, one per lane.
struct KeyWalk {
  const AttentionParams& p;
  const int limit;  // main keys of original index >= limit do not exist
  const int lane;
  int run, run_end;  // next run, end of the tile's runs
  int batch;         // the lanes hold runs batch .. batch + 31
  int lane_start, lane_length, lane_mask;
  int segment;           // of the current piece; -1: main keys
  int position, left;    // next key of the piece, keys left; left == 0: end of the stream
  int mask, words, bit;  // first mask word of the run (-1: full), words per row, bit of `position`

  VD_METHOD KeyWalk(const AttentionParams& params, const Item& item)
      : p(params), limit(key_limit(params, item.batch)), lane(threadIdx.x % 32) {
    run = 0;
    run_end = item.tile < 0 ? 1 : 0;  // dense: one run of all keys
    if (item.tile >= 0) {
      run = min_int(max_int(p.plan.run_ptr[item.tile], 0), p.plan.num_runs);
      run_end = min_int(p.plan.run_ptr[item.tile + 1], p.plan.num_runs);
    }
    batch = item.tile < 0 ? 0 : -32;
    lane_start = 0;
    lane_length = p.lk;
    lane_mask = -1;
    segment = -1;
    position = left = 0;
    mask = -1;
    words = bit = 0;
    next();
  }

  // To the first piece, or the one after the current, that has keys.
  VD_METHOD void next() {
    while (run < run_end) {
      if (run - batch >= 32) {
        batch = run;
        if (run + lane < run_end) {
          const int32_t* r = p.plan.runs + 3 * int64_t(run + lane);
          lane_start = r[0];
          lane_length = r[1];
          lane_mask = r[2];
        }
      }
      const int from = run - batch;
      position = int(arch::shfl(lane_start, from));
      left = int(arch::shfl(lane_length, from));
      mask = int(arch::shfl(lane_mask, from));
      ++run;
      words = int((uint32_t(left) + 31) / 32);
      bit = 0;
      const int end = p.plan.kv_order.data == nullptr ? limit : p.lk;  // permuted keys are checked one by one
      if (position < 0 || position >= end || (mask >= 0 && p.plan.mask_bits == nullptr)) left = 0;
      left = min_int(left, end - position);
      if (left > 0) return;
    }
    mask = -1;
    left = 0;
    while (segment + 1 < p.num_segments) {
      ++segment;
      position = 0;
      left = p.segment[segment].length;
      if (left > 0) return;
    }
    left = 0;
  }

  VD_METHOD void advance(int keys) {
    position += keys;
    bit += keys;
    left -= keys;
    if (left == 0) next();
  }

  // Over the keys of one stage in which pieces begin at multiples of `grain` slots.
  VD_METHOD void skip_stage(int grain) {
    for (int filled = 0; filled < kKeys && left > 0;) {
      const int n = min_int(left, kKeys - filled);
      filled += (n + grain - 1) / grain * grain;
      advance(n);
    }
  }

  // The next n keys of a partial run go to slots [first, first + n): which of the slots 32 * word .. 32 * word + 31
  // among them does `row` of the tile not read?
  VD_METHOD uint32_t blocked(int word, int first, int n, int row) const {
    const int lo = max_int(first, 32 * word), hi = min_int(first + n, 32 * word + 32);
    if (lo >= hi) return 0;
    const uint32_t slots = (hi - lo == 32 ? ~0u : (1u << (hi - lo)) - 1) << (lo - 32 * word);
    const int from = bit + lo - first;
    const int64_t at = mask + int64_t(row) * words + from / 32;
    uint32_t read = 0;
    if (at < p.plan.num_mask_words) read = uint32_t(p.plan.mask_bits[at]) >> (from % 32);
    if (from % 32 + hi - lo > 32 && at + 1 < p.plan.num_mask_words)
      read |= uint32_t(p.plan.mask_bits[at + 1]) << (32 - from % 32);
    return slots & ~(read << (lo - 32 * word));
  }
};

// Every lane brings one row (null: zeros); the warp copies 32 rows, 16 bytes a lane, into rows first .. first + 31 of a
// tile. Columns from p.dim to kDim are zeroed.
template <int kDim>
VD_DEV void copy_rows(const AttentionParams& p, uint32_t tile, int first, const char* row) {
  constexpr int kChunks = kDim / 8, kRowsAtOnce = 32 / kChunks;
  const int lane = threadIdx.x % 32, chunk = lane % kChunks;
  const uint64_t address = reinterpret_cast<uint64_t>(row);
  const uint32_t panel = tile + (chunk / 8) * Smem<kDim>::kPanelBytes;
  VD_UNROLL for (int i = 0; i < 32 / kRowsAtOnce; ++i) {
    const int r = i * kRowsAtOnce + lane / kChunks;
    const uint64_t lo = arch::shfl(uint32_t(address), r), hi = arch::shfl(uint32_t(address >> 32), r);
    const char* source = reinterpret_cast<const char*>(hi << 32 | lo);
    const bool there = source != nullptr && chunk * 8 < p.dim;
    const void* from = there ? source + chunk * 16 : p.q.data;  // a valid address also where nothing is read
    arch::cp_async16(panel + (first + r) * 128 + ((chunk ^ r) % 8) * 16, from, there);
  }
}

// Q: rows in the order of the plan. By all 128 threads.
template <int kDim>
VD_DEV void load_queries(const AttentionParams& p, const Item& item, uint32_t smem, const Barriers& bars) {
  const int row = threadIdx.x % 128;
  const char* source = nullptr;
  if (row < item.rows) {
    const int32_t* order = order_row(p.plan.q_order, item.batch, item.head, p.lq);
    const int at = order == nullptr ? item.start + row : order[item.start + row];
    if (at >= 0 && at < p.lq) source = row_pointer(p.q, item.batch, item.head, at, 2);
  }
  copy_rows<kDim>(p, smem + Smem<kDim>::kQ, row & ~31, source);
  arch::cp_async_mbar_arrive_noinc(bars.q_full);
}

// Where the rows of one stage come from: every thread holds the row of one slot.
struct StageRows {
  const char *k, *v;
  uint32_t blocked[4];  // slots that the query row with this thread's number does not read
  bool blocks;          // any thread may have a blocked slot
};

VD_DEV StageRows resolve(KeyWalk& walk, const Item& item, const int32_t* order) {
  const AttentionParams& p = walk.p;
  const int slot = threadIdx.x % 128, kv_head = item.head / (p.heads / p.kv_heads);
  StageRows rows{};
  for (int filled = 0; filled < kKeys && walk.left > 0;) {
    const int n = min_int(walk.left, kKeys - filled);
    if (slot >= filled && slot < filled + n) {
      int at = walk.position + slot - filled;
      if (walk.segment >= 0) {
        const Segment& s = p.segment[walk.segment];
        rows.k = row_pointer(s.k, item.batch, kv_head, at, 2);
        rows.v = row_pointer(s.v, item.batch, kv_head, at, 2);
      } else {
        if (order != nullptr) at = order[at];
        if (at >= 0 && at < walk.limit) {
          rows.k = row_pointer(p.k, item.batch, kv_head, at, 2);
          rows.v = row_pointer(p.v, item.batch, kv_head, at, 2);
        }
      }
    }
    if (walk.mask >= 0) {
      rows.blocks = true;
      if (slot < item.rows) {
        VD_UNROLL for (int w = 0; w < 4; ++w) rows.blocked[w] |= walk.blocked(w, filled, n, item.first + slot);
      }
    }
    filled += n;
    walk.advance(n);
  }
  return rows;
}

// By all 128 threads. A full barrier counts 128 threads whose copies have landed, and for K one lane of each warp that
// has written its part of the record.
template <int kDim>
VD_DEV void produce_gather(const AttentionParams& p, const Item& item, int split, int splits, uint32_t smem,
                           const Barriers& bars) {
  using S = Smem<kDim>;
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
  load_queries<kDim>(p, item, smem, bars);
  const int32_t* order = order_row(p.plan.kv_order, item.batch, item.head, p.lk);
  KeyWalk walk(p, item);
  for (int i = 0; i < split; ++i) walk.skip_stage(1);
  int ends = alternates(item) ? 2 : 1;
  for (int j = 0; ends > 0; ++j) {
    const int stage = j % kStages, phase = (j / kStages) & 1;
    const bool end = walk.left == 0;
    StageRows rows = resolve(walk, item, order);
    for (int i = 1; i < splits; ++i) walk.skip_stage(1);
    const uint32_t valid = arch::vote_ballot(rows.k != nullptr);
    const uint32_t record = smem + S::kRecord + stage * S::kRecordBytes;

    arch::mbar_wait(bars.k_empty(stage), phase ^ 1);
    if (rows.blocks) {
      arch::sts128(smem + S::kBlocked + stage * S::kBlockedBytes + thread * 16,
                   uint4{rows.blocked[0], rows.blocked[1], rows.blocked[2], rows.blocked[3]});
    }
    if (lane == 0) arch::sts32(record + 4 * warp, valid);
    if (thread == 0) arch::sts32(record + 16, (end ? kEnd : 0) | (rows.blocks ? kBlocks : 0) | kGeneric);
    arch::syncwarp();
    if (lane == 0) arch::mbar_arrive(bars.k_full(stage));  // releases the record
    if (!end) copy_rows<kDim>(p, smem + S::kK + stage * S::kTileBytes, 32 * warp, rows.k);
    arch::cp_async_mbar_arrive_noinc(bars.k_full(stage));
    if (end) {
      --ends;
      continue;
    }
    arch::mbar_wait(bars.v_empty(stage), phase ^ 1);
    copy_rows<kDim>(p, smem + S::kV + stage * S::kTileBytes, 32 * warp, rows.v);
    arch::cp_async_mbar_arrive_noinc(bars.v_full(stage));
  }
}

}  // namespace vdit::gpu::sm90a

// The keys an item reads, numbered 0 .. total - 1: those of the runs of its tile in order, then the segments.
// Stage j holds the keys j * kKeys + slot, wherever runs begin and end. One warp (the resolver) turns a stage into
// addresses of rows; all threads copy them.
#pragma once
#include "kernels/attention/work.h"

namespace vdit::gpu::sm80 {

struct KeyList {
  int32_t run, run_end;  // of the tile
  int32_t positions;     // permuted positions at or above this are dropped
  int32_t limit;         // original indices at or above this are dropped
  int32_t main, total;   // keys of the runs; with the segments
};

VD_DEV int32_t clamp_int(int32_t v, int32_t low, int32_t high) { return v < low ? low : v > high ? high : v; }

// Keys a run has after clamping. Its first key is always its first, so mask bits keep their places.
VD_DEV int32_t run_length(int32_t start, int32_t length, int32_t positions) {
  if (start < 0 || start >= positions || length <= 0) return 0;
  return length < positions - start ? length : positions - start;
}

// Called by all threads; `sums` has one entry per warp. Contains a barrier.
template <int kThreads>
VD_DEV KeyList list_keys(const AttentionParams& p, const Item& item, uint32_t sums) {
  KeyList list;
  list.limit = key_limit(p, item.batch);
  list.positions = p.plan.kv_order.data != nullptr ? p.lk : list.limit;
  list.run = list.run_end = 0;
  uint32_t count = 0;
  if (item.tile >= 0) {
    list.run = clamp_int(p.plan.run_ptr[item.tile], 0, p.plan.num_runs);
    list.run_end = clamp_int(p.plan.run_ptr[item.tile + 1], list.run, p.plan.num_runs);
    for (int64_t r = list.run + int64_t(threadIdx.x); r < list.run_end; r += kThreads)
      count += uint32_t(run_length(p.plan.runs[3 * r], p.plan.runs[3 * r + 1], list.positions));
  } else if (threadIdx.x == 0) {
    count = uint32_t(list.positions);
  }
  VD_UNROLL for (int step = 16; step > 0; step /= 2) count += arch::shfl_xor(count, step);
  if (threadIdx.x % 32 == 0) arch::sts32(sums + threadIdx.x / 32 * 4, count);
  arch::syncthreads();
  uint32_t all = 0;
  VD_UNROLL for (int i = 0; i < kThreads / 32; ++i) all += arch::lds32(sums + i * 4);
  list.main = all < uint32_t(p.lk) ? int32_t(all) : p.lk;  // runs that overlap may have more
  list.total = list.main;
  for (int s = 0; s < p.num_segments; ++s) list.total += p.segment[s].length;
  return list;
}

// What a stage needs, in shared memory. Stages alternate between two copies of `pointers` and `pieces`; a header is
// read while that of two stages later is written, so there are four.
template <int kKeys>
struct StageInfo {
  static constexpr int kPointers = 0;                        // [2][k, v][kKeys] addresses; 0: the slot is not loaded
  static constexpr int kPieces = kPointers + 32 * kKeys;     // [2][kKeys] uint4, see resolve()
  static constexpr int kHeaders = kPieces + 2 * 16 * kKeys;  // [4]: bits of slots that hold a key (64), pieces
  static constexpr int kBytes = kHeaders + 4 * 16;
  uint32_t base;
  VD_METHOD uint32_t k_pointers(int j) const { return base + kPointers + (j & 1) * 16 * kKeys; }
  VD_METHOD uint32_t v_pointers(int j) const { return k_pointers(j) + 8 * kKeys; }
  VD_METHOD uint32_t pieces(int j) const { return base + kPieces + (j & 1) * 16 * kKeys; }
  VD_METHOD uint32_t header(int j) const { return base + kHeaders + (j & 3) * 16; }
};

// State of the resolver in registers: a window of 32 runs, one per lane.
struct RunWindow {
  int32_t next;          // first run behind the window
  int32_t begin, end;    // key numbers the window holds
  int32_t start;         // of the lane's run: position of its first key,
  int32_t key, key_end;  //   its key numbers,
  int32_t mask, words;   //   first word of its mask or -1, words per row

  VD_METHOD void load(const AttentionParams& p, const KeyList& list) {
    const int lane = threadIdx.x % 32;
    const int64_t r = int64_t(next) + lane;
    int32_t length = 0;
    start = 0;
    mask = -1;
    words = 0;
    if (r < list.run_end) {
      start = p.plan.runs[3 * r];
      const int32_t all = p.plan.runs[3 * r + 1];
      mask = p.plan.runs[3 * r + 2];
      length = run_length(start, all, list.positions);
      words = int32_t((uint32_t(all) + 31) / 32);
    }
    set(length);
    next += 32;
  }
  VD_METHOD void load_dense(const KeyList& list) {
    next = 0;
    start = 0;
    mask = -1;
    words = 0;
    set(threadIdx.x % 32 == 0 ? list.main : 0);
  }
  VD_METHOD void set(int32_t length) {
    const int lane = threadIdx.x % 32;
    uint32_t sum = uint32_t(length);
    VD_UNROLL for (int step = 1; step < 32; step *= 2) {
      const uint32_t below = arch::shfl(sum, lane >= step ? lane - step : lane);
      if (lane >= step) sum += below;
    }
    begin = end;
    key_end = int32_t(uint32_t(end) + sum);
    key = key_end - length;
    end = int32_t(arch::shfl(uint32_t(key_end), 31));
  }
};

// First half, called by the resolver warp: permuted positions of the keys of stage j (-1: none), and the pieces of runs
// with mask bits: {first slot | keys << 8 | first bit << 16, first word of row 0, words per row, first word in a row}.
// Returns the number of pieces.
template <int kKeys>
VD_DEV int resolve(const AttentionParams& p, const KeyList& list, RunWindow& window, int j, uint32_t pieces,
                   int32_t (&position)[kKeys / 32]) {
  const int lane = threadIdx.x % 32;
  const int32_t first = j * kKeys;
  int count = 0;
  VD_UNROLL for (int i = 0; i < kKeys / 32; ++i) position[i] = -1;
  while (first < list.main) {
    if (window.end > first) {
      const bool whole = window.key <= first && window.key_end >= first + kKeys;
      const uint32_t one = arch::vote_ballot(whole);
      if (one != 0) {  // the stage lies in a single run
        const int owner = arch::popc((one & -one) - 1);
        const int32_t start = int32_t(arch::shfl(uint32_t(window.start), owner));
        const int32_t key = int32_t(arch::shfl(uint32_t(window.key), owner));
        VD_UNROLL for (int i = 0; i < kKeys / 32; ++i) position[i] = start + (first + lane + 32 * i - key);
      } else {
        VD_UNROLL for (int i = 0; i < kKeys / 32; ++i) {
          const int32_t number = first + lane + 32 * i;
          int owner = 0;  // the first lane whose run ends behind the key
          VD_UNROLL for (int step = 16; step > 0; step /= 2) {
            const int32_t end = int32_t(arch::shfl(uint32_t(window.key_end), owner + step - 1));
            if (end <= number) owner += step;
          }
          const int32_t start = int32_t(arch::shfl(uint32_t(window.start), owner));
          const int32_t key = int32_t(arch::shfl(uint32_t(window.key), owner));
          if (number >= window.begin && number < window.end) position[i] = start + (number - key);
        }
      }
      const int32_t from = window.key > first ? window.key : first;
      const int32_t to = window.key_end < first + kKeys ? window.key_end : first + kKeys;
      const bool masked = from < to && window.mask >= 0;
      const uint32_t all = arch::vote_ballot(masked);
      if (masked) {
        const int rank = count + arch::popc(all & ((1u << lane) - 1));
        const int32_t bit = from - window.key;
        arch::sts128(pieces + (rank < kKeys ? rank : kKeys - 1) * 16,
                     uint4{uint32_t((from - first) | (to - from) << 8 | (bit % 32) << 16), uint32_t(window.mask),
                           uint32_t(window.words), uint32_t(bit / 32)});
      }
      count += arch::popc(all);
    }
    if (window.end >= first + kKeys || window.next >= list.run_end) break;
    window.load(p, list);
  }
  return count < kKeys ? count : kKeys;
}

// Original index of a position, or -1. The load of a permutation is used half an iteration later, by publish().
VD_DEV int32_t original_key(const AttentionParams& p, const int32_t* kv_order, int32_t position) {
  if (position < 0 || position >= p.lk) return -1;
  return kv_order != nullptr ? kv_order[position] : position;
}

// Second half: addresses of the rows of stage j and its header.
template <int kKeys>
VD_DEV void publish(const AttentionParams& p, const Item& item, const KeyList& list, int j, int pieces,
                    const int32_t (&original)[kKeys / 32], const StageInfo<kKeys>& info) {
  const int lane = threadIdx.x % 32;
  const int32_t head = item.head / (p.heads / p.kv_heads);
  uint32_t valid[2] = {~0u, ~0u};
  VD_UNROLL for (int i = 0; i < kKeys / 32; ++i) {
    const int slot = lane + 32 * i;
    int32_t number = j * kKeys + slot;
    uint64_t k = 0, v = 0;
    if (number < list.main) {
      if (original[i] >= 0 && original[i] < list.limit) {
        k = reinterpret_cast<uint64_t>(row_pointer(p.k, item.batch, head, original[i], 2));
        v = reinterpret_cast<uint64_t>(row_pointer(p.v, item.batch, head, original[i], 2));
      }
    } else if (number < list.total) {
      number -= list.main;
      for (int s = 0; s < p.num_segments; ++s) {
        if (number < p.segment[s].length) {
          k = reinterpret_cast<uint64_t>(row_pointer(p.segment[s].k, item.batch, head, number, 2));
          v = reinterpret_cast<uint64_t>(row_pointer(p.segment[s].v, item.batch, head, number, 2));
          break;
        }
        number -= p.segment[s].length;
      }
    }
    arch::sts64(info.k_pointers(j) + slot * 8, uint2{uint32_t(k), uint32_t(k >> 32)});
    arch::sts64(info.v_pointers(j) + slot * 8, uint2{uint32_t(v), uint32_t(v >> 32)});
    valid[i] = arch::vote_ballot(k != 0);
  }
  if (lane == 0) arch::sts128(info.header(j), uint4{valid[0], valid[1], uint32_t(pieces), 0});
}

// Mask bits of 32 slots (from 32 * word on) of one row of the tile; slots of runs without a mask are 1.
VD_DEV uint32_t slot_bits(const Plan& plan, uint32_t pieces, int count, int64_t row, int word) {
  uint32_t bits = ~0u;
  for (int i = 0; i < count; ++i) {
    const uint4 piece = arch::lds128(pieces + i * 16);
    const int slot = piece.x & 255, end = slot + (piece.x >> 8 & 255);
    const int from = slot > 32 * word ? slot : 32 * word, to = end < 32 * word + 32 ? end : 32 * word + 32;
    if (from >= to) continue;
    const uint32_t bit = (piece.x >> 16) + uint32_t(from - slot);
    const int64_t at = int64_t(piece.y) + row * int64_t(piece.z) + piece.w + bit / 32;
    const int shift = bit % 32, n = to - from;
    uint64_t value = at < plan.num_mask_words ? uint32_t(plan.mask_bits[at]) : 0;
    if (shift + n > 32 && at + 1 < plan.num_mask_words) value |= uint64_t(uint32_t(plan.mask_bits[at + 1])) << 32;
    const uint32_t range = (n == 32 ? ~0u : (1u << n) - 1) << (from - 32 * word);
    bits = (bits & ~range) | (uint32_t(value >> shift) << (from - 32 * word) & range);
  }
  return bits;
}

}  // namespace vdit::gpu::sm80

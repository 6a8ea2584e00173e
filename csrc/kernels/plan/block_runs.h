// Device side of compile_blocks.h.
#pragma once
#include "arch/arch.h"
#include "kernels/block_sum.h"
#include "kernels/plan/compile_blocks.h"

namespace vdit::gpu::plan {

constexpr int kWarps = 8, kWarpThreads = kWarps * 32;  // of kernels with a warp per row of the map
constexpr int kListThreads = 512, kPlaceThreads = 1024;

// Walks the runs of a row of the map, 32 blocks at a time. body(run, begin, end) is called in one lane per run, with
// its number in the row and its keys. Returns the number of runs.
//
// A run ends where a block with keys is not read, so empty blocks neither end a run nor begin one.
template <class Body>
VD_DEV uint32_t walk_runs(const uint8_t* keep, const int64_t* kv_len, int64_t nk, Body body) {
  const int lane = threadIdx.x % 32;
  const uint32_t lower = (1u << lane) - 1;
  uint32_t runs = 0, open_begin = 0, position = 0;
  bool open = false;  // the last block with keys is read
  for (int64_t base = 0; base < nk; base += 32) {
    const int64_t j = base + lane;
    const uint32_t keys = j < nk && kv_len[j] > 0 ? uint32_t(kv_len[j]) : 0;
    const bool read = keys > 0 && keep[j] != 0;
    const uint32_t filled = arch::vote_ballot(keys > 0), kept = arch::vote_ballot(read);
    const int before = arch::highest_bit(filled & lower);
    const bool read_before = before >= 0 ? (kept >> before & 1) != 0 : open;
    const uint32_t starts = arch::vote_ballot(read && !read_before);
    const uint32_t end = position + warp_inclusive_sum(keys), begin = end - keys;
    const int start = arch::highest_bit(starts & lower);
    const uint32_t start_begin = arch::shfl(begin, start < 0 ? 0 : start);
    if (keys > 0 && !read && read_before)
      body(runs + uint32_t(arch::popc(starts & lower)) - 1, start < 0 ? open_begin : start_begin, begin);
    const int last_start = arch::highest_bit(starts);
    const uint32_t last_begin = arch::shfl(begin, last_start < 0 ? 0 : last_start);
    if (last_start >= 0) open_begin = last_begin;
    if (filled != 0) open = (kept >> arch::highest_bit(filled) & 1) != 0;
    runs += uint32_t(arch::popc(starts));
    position = arch::shfl(end, 31);
  }
  if (open && lane == 0) body(runs - 1, open_begin, position);
  return runs;
}

VD_DEV const int64_t* key_lengths(const BlockMap& m, int64_t row) {
  return m.kv_len + (m.kv_groups == 1 ? 0 : row / m.nq * m.nk);
}

// A warp per query block.
VD_KERNEL(kWarpThreads, 1) count_runs(const VD_GRID_CONST BlockMap m, const VD_GRID_CONST TileList list) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= m.groups * m.nq) return;  // whole warps
  uint64_t reads = 0;
  const uint32_t runs = walk_runs(m.keep + row * m.nk, key_lengths(m, row), m.nk,
                                  [&](uint32_t, uint32_t begin, uint32_t end) { reads += end - begin; });
  reads = warp_inclusive_sum(reads);
  if (threadIdx.x % 32 == 31) {
    list.reads[row] = int64_t(reads);
    list.runs[row] = int32_t(runs);
  }
}

VD_DEV int64_t pieces(const BlockMap& m, int64_t rows) {
  if (m.q_tile == 0) return 1;
  return rows > 0 ? (rows - 1) / m.q_tile + 1 : 0;
}

// A CTA per group.
VD_KERNEL(kListThreads, 1) list_tiles(const VD_GRID_CONST BlockMap m, const VD_GRID_CONST TileList list) {
  VD_SHARED(uint64_t, tile_totals, kListThreads / 32);
  VD_SHARED(uint64_t, row_totals, kListThreads / 32);
  const int64_t group = blockIdx.x;
  const int64_t* q_len = m.q_len + (m.q_groups == 1 ? 0 : group * m.nq);

  // Tiles of the groups before this one: all have as many if they share their lengths.
  uint64_t mine = 0;
  const int64_t earlier = m.q_groups == 1 ? m.nq : group * m.nq;
  for (int64_t i = threadIdx.x; i < earlier; i += kListThreads) mine += uint64_t(pieces(m, m.q_len[i]));
  block_inclusive_sum(mine, tile_totals);
  uint64_t tile = 0, row = 0;
  for (int w = 0; w < kListThreads / 32; ++w) tile += tile_totals[w];
  if (m.q_groups == 1) tile *= uint64_t(group);

  for (int64_t chunk = 0; chunk < m.nq; chunk += kListThreads) {
    arch::syncthreads();  // the totals have been read
    const int64_t i = chunk + threadIdx.x;
    const int64_t rows = i < m.nq && q_len[i] > 0 ? q_len[i] : 0, count = i < m.nq ? pieces(m, rows) : 0;
    int64_t at = int64_t(tile + block_inclusive_sum(uint64_t(count), tile_totals)) - count;
    int64_t first = int64_t(row + block_inclusive_sum(uint64_t(rows), row_totals)) - rows;
    int64_t left = rows;
    for (int64_t piece = 0; piece < count && at < m.tiles; ++piece, ++at) {
      const int64_t taken = m.q_tile == 0 || left < m.q_tile ? left : m.q_tile;
      list.source[3 * at] = int32_t(group * m.nq + i);
      list.source[3 * at + 1] = int32_t(first);
      list.source[3 * at + 2] = int32_t(taken);
      list.work[at] = taken > 0 ? list.reads[group * m.nq + i] * taken : -1;
      first += taken;
      left -= taken;
    }
    for (int w = 0; w < kListThreads / 32; ++w) {
      tile += tile_totals[w];
      row += row_totals[w];
    }
  }
  if (group + 1 < m.groups) return;
  for (int64_t at = int64_t(tile) + threadIdx.x; at < m.tiles; at += kListThreads) {
    list.source[3 * at] = int32_t(m.groups * m.nq - 1);
    list.source[3 * at + 1] = list.source[3 * at + 2] = 0;
    list.work[at] = -1;
  }
}

// One CTA.
VD_KERNEL(kPlaceThreads, 1)
place_tiles(const VD_GRID_CONST BlockMap m, const VD_GRID_CONST TileList list, const int64_t* order,
            const VD_GRID_CONST PlanLists out) {
  VD_SHARED(uint64_t, totals, 2 * (kPlaceThreads / 32));
  uint64_t done = 0;
  int buffer = 0;
  for (int64_t chunk = 0; chunk < m.tiles; chunk += kPlaceThreads, buffer ^= kPlaceThreads / 32) {
    const int64_t t = chunk + threadIdx.x;
    uint64_t count = 0;
    if (t < m.tiles) {
      const int32_t* source = list.source + 3 * order[t];
      if (source[2] > 0) count = uint64_t(list.runs[source[0]]);
      out.tiles[3 * t] = int32_t(source[0] / m.nq);
      out.tiles[3 * t + 1] = source[1];
      out.tiles[3 * t + 2] = source[2];
    }
    const uint64_t end = done + block_inclusive_sum(count, totals + buffer);  // two buffers: one barrier per chunk
    if (t < m.tiles) out.run_ptr[t + 1] = int32_t(end);
    for (int w = 0; w < kPlaceThreads / 32; ++w) done += totals[buffer + w];
  }
  if (threadIdx.x == 0) out.run_ptr[0] = 0;
}

// A warp per tile. It also marks its share of the unused runs.
VD_KERNEL(kWarpThreads, 1)
emit_runs(const VD_GRID_CONST BlockMap m, const VD_GRID_CONST TileList list, const int64_t* order,
          const VD_GRID_CONST PlanLists out) {
  const int64_t t = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (t >= m.tiles) return;  // whole warps
  const int32_t* source = list.source + 3 * order[t];
  if (source[2] > 0) {
    const int64_t row = source[0];
    int32_t* runs = out.runs + 3 * int64_t(out.run_ptr[t]);
    walk_runs(m.keep + row * m.nk, key_lengths(m, row), m.nk, [&](uint32_t run, uint32_t begin, uint32_t end) {
      runs[3 * run] = int32_t(begin);
      runs[3 * run + 1] = int32_t(end - begin);
      runs[3 * run + 2] = -1;
    });
  }
  const int64_t share = (m.nk + 1) / 2, used = out.run_ptr[m.tiles];
  int64_t unused = t * share > used ? t * share : used;
  for (unused += threadIdx.x % 32; unused < (t + 1) * share; unused += 32) {
    out.runs[3 * unused] = out.runs[3 * unused + 1] = 0;
    out.runs[3 * unused + 2] = -1;
  }
}

}  // namespace vdit::gpu::plan

// From a boolean map of query and key blocks to the lists of a plan (docs/plan.md): tiles in descending order of work,
// and for each its runs of neighbouring key blocks that are read. Buffers have the length that shapes allow at most;
// nothing is read back to the host.
//
//   cuda_list_tiles   every tile in the order of the blocks, and its work: query rows times keys, -1 if it has no rows
//   (the caller sorts the work: `order`, descending and stable)
//   cuda_place_runs   the lists, in that order
#pragma once
#include <cstdint>

namespace vdit {

struct BlockMap {
  const uint8_t* keep;    // [groups, nq, nk], contiguous; not 0: read
  const int64_t* q_len;   // [q_groups, nq]; block lengths, 0 allowed; below it: 0, unless the caller refuses it
  const int64_t* kv_len;  // [kv_groups, nk]; a run goes on over empty key blocks
  int64_t groups, nq, nk;
  int32_t q_groups, kv_groups;  // 1 or `groups`
  int64_t q_tile;               // most rows of a tile; 0: a tile per query block
  int64_t tiles;  // length of the lists: a tile per block, or groups * (nq + lq / q_tile); 0 without blocks
};

struct TileList {
  int64_t* reads;   // [groups, nq]: keys a query block reads
  int32_t* runs;    // [groups, nq]: in so many runs
  int32_t* source;  // [tiles, 3]: query block in [0, groups * nq), first row, rows (0: unused)
  int64_t* work;    // [tiles]
};

struct PlanLists {
  int32_t* tiles;    // [tiles, 3]: group, first row, rows
  int32_t* run_ptr;  // [tiles + 1]
  int32_t* runs;     // [tiles * ceil(nk / 2), 3]: first key, keys, -1; unused ones 0, 0, -1
};

// Launch on `stream` (a cudaStream_t) of the current device; return 0 or the cudaError_t of a launch.
int cuda_list_tiles(const BlockMap& map, const TileList& list, void* stream);
int cuda_place_runs(const BlockMap& map, const TileList& list, const int64_t* order, const PlanLists& out,
                    void* stream);

}  // namespace vdit

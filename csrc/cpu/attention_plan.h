// Host-side views of a plan: bounds checks, tiles grouped by head, panel lists of one tile.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/tile_kernels.h"

namespace vdit {

// Empty, or what is wrong with the run lists for tensors of these lengths. Everything the kernels index by is checked.
std::string check_plan(const PlanView& plan, int64_t batch, int64_t heads, int64_t lq, int64_t lk, int64_t num_runs,
                       int64_t mask_words);

// The run lists of a dense plan: tiles of kTileRows queries, one run over all keys.
struct DensePlan {
  std::vector<int32_t> tiles, run_ptr, runs;
  DensePlan(int64_t lq, int64_t lk);
  PlanView view() const;
};

// The plan with a run-less tile over every stretch of rows that no tile owns: such rows still read the segments.
struct CoveredPlan {
  std::vector<int32_t> tiles, run_ptr;
  CoveredPlan(const PlanView& plan, int64_t lq);
};

// At most kTileRows query rows of one head.
struct WorkItem {
  int32_t batch, head, tile, q_start, rows, mask_row;
  int32_t source;  // index of its keys and values in the group at hand
  int64_t cost;
};

// How many items a head has, and how many panels they read together.
struct Reads {
  int64_t items = 0, panels = 0;
};

// Tiles by plan head, in the plan's order.
class TileIndex {
 public:
  TileIndex(const PlanView& plan, int panel_keys);
  // Appends the items of head (b, h); large tiles are cut evenly.
  void append_items(int64_t b, int64_t h, int32_t source, std::vector<WorkItem>* items) const;
  Reads reads(int64_t b, int64_t h) const;

 private:
  size_t head(int64_t b, int64_t h) const {
    return static_cast<size_t>((plan_.batch > 1 ? b : 0) * plan_.heads + (plan_.heads > 1 ? h : 0));
  }
  const PlanView& plan_;
  std::vector<int64_t> first_;
  std::vector<int32_t> tiles_;
  std::vector<int64_t> keys_, panels_;  // per tile
};

// The readable panels of a tile's runs. valid_panels: per panel the keys that exist (kv_len).
void list_panels(const PlanView& plan, int32_t tile, int panel_keys, const uint32_t* valid_panels,
                 std::vector<PanelRef>* refs);
// Every panel of a sequence, as for a segment.
void list_all_panels(int64_t panels, const uint32_t* valid_panels, std::vector<PanelRef>* refs);

}  // namespace vdit

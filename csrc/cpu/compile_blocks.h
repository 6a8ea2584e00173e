// CPU twin of kernels/plan/compile_blocks.h, with lists of exactly the needed length.
#pragma once
#include <functional>
#include <vector>

#include "kernels/plan/compile_blocks.h"

namespace vdit {

class BlockCompiler {
 public:
  // Calls fn(first, last) for parts of [0, n), on whatever threads.
  using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t, int64_t)>& fn)>;

  BlockCompiler(const BlockMap& map, ParallelFor parallel_for);

  int64_t tiles() const { return int64_t(tiles_.size()); }
  int64_t runs() const { return runs_; }
  // Buffers of tiles() x 3, tiles() + 1 and runs() x 3 numbers.
  void write(const PlanLists& out) const;

 private:
  struct Tile {
    int64_t work;
    int32_t row, first, rows;
  };
  // The key blocks with keys, for one group of kv_len.
  struct Columns {
    std::vector<int32_t> block;  // empty: all
    std::vector<int32_t> edge;   // first key of each, and the end
  };
  const Columns& columns(int64_t row) const { return columns_[map_.kv_groups == 1 ? 0 : size_t(row / map_.nq)]; }
  void pack(int64_t row, uint8_t* gathered);

  BlockMap map_;
  ParallelFor parallel_for_;
  std::vector<Columns> columns_;
  int64_t words_;                // 64 blocks each, per row
  std::vector<uint64_t> turns_;  // bit j of a row: a run begins or ends at the j-th block with keys
  std::vector<int64_t> reads_;   // keys, per row
  std::vector<int32_t> counts_;  // runs, per row
  std::vector<Tile> tiles_;
  int64_t runs_ = 0;
};

}  // namespace vdit

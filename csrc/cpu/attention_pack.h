// Keys and values of the heads at hand in the layout of the tile kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/attention.h"
#include "cpu/tile_kernels.h"

namespace vdit {

inline const char* row_of(const View4& t, int64_t b, int64_t n, int64_t h) {
  const int64_t offset = b * t.stride[0] + n * t.stride[1] + h * t.stride[2];
  return static_cast<const char*>(t.data) + offset * (t.dtype == DType::f32 ? 4 : 2);
}
inline char* row_of_mut(const View4& t, int64_t b, int64_t n, int64_t h) {
  return const_cast<char*>(row_of(t, b, n, h));
}

inline int round_up(int64_t n, int64_t to) { return static_cast<int>((n + to - 1) / to * to); }

// The rows of a panel's keys; null where there is no key.
struct PanelRows {
  const void *k[kMaxPanelKeys], *v[kMaxPanelKeys];
  uint32_t valid;
};

// One sequence of keys of one head: the main sequence or a segment.
struct PackedSequence {
  View4 k, v;
  int64_t batch = 0, head = 0, length = 0;
  const int32_t* order = nullptr;
  int64_t valid_length = 0;  // keys with an original index at or above it do not exist
  bool backward = false;
  bool whole = true;  // packed before the items run; otherwise by every item, stage by stage, as far as it reads

  int64_t panels = 0;
  KeyValues kv{};
  std::vector<uint32_t> valid;
  std::unique_ptr<float[]> memory;

  void allocate(const TileKernels& kernels, int head_dim, int row);
  void pack(const TileKernels& kernels, int head_dim, int row, int64_t first_panel, int64_t end_panel);
  // The rows of the panels of refs [0, n), at most a stage, for the kernel to ask for.
  void list_rows(const TileKernels& kernels, int head_dim, const PanelRef* refs, int n, NextRows* rows) const;
  // Packs the panels of refs [0, n), at most a stage, into `memory` (stage_floats), and makes the refs those of the
  // copies.
  KeyValues pack_stage(const TileKernels& kernels, int head_dim, int row, PanelRef* refs, int n, float* memory) const;
  bool direct_v(int head_dim, int row) const;  // v can be read in place
  static int64_t floats(const TileKernels& kernels, int64_t length, int head_dim, int row, bool backward);

 private:
  PanelRows rows_of(int64_t panel, int keys) const;
};

constexpr int64_t stage_floats(int head_dim, int row) { return int64_t{kStageKeys} * (head_dim + row); }

// A key/value head and everything its query heads read: the main sequence first, then the segments.
struct Source {
  int64_t batch, kv_head, head_begin, head_end;
  std::vector<PackedSequence> sequences;
};

// All sources of a call; one per kv head, or one per query head where kv_order differs between heads.
std::vector<Source> list_sources(const AttentionParams& p, bool backward);

// Allocates and packs sources [begin, end) in parallel; of sequences that are not packed whole, what there is to read.
void pack_sources(const AttentionParams& p, std::vector<Source>* sources, size_t begin, size_t end,
                  const ParallelFor& parallel);

// How many sources from `begin` on fit the packing budget (at least one).
size_t sources_in_budget(const AttentionParams& p, const std::vector<Source>& sources, size_t begin);

}  // namespace vdit

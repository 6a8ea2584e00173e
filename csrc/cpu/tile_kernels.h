// The interface between the driver (one baseline build) and the tile kernels (one build per instruction set).
// Plain data and function pointers only: inline library code instantiated in an AVX-512 unit could be merged by the
// linker into the copy that an AVX2 machine runs.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace vdit {

constexpr int kTileRows = 96;   // query rows per work item; a multiple of every micro-kernel height (4, 6, 12)
constexpr int kSumLanes = 16;   // a row sum is kept per vector lane and added up at the end
constexpr int kStageKeys = 64;  // keys whose scores are held at once; a multiple of every panel width (8, 16, 32)
constexpr int kMaxPanelKeys = 32;

// One panel of `panel_keys` consecutive keys, and which of them may be read.
struct PanelRef {
  int32_t panel;
  uint32_t valid;  // bit j: key panel*panel_keys + j
  int32_t mask;    // -1, or word offset of the run's bit mask
  int32_t shift;   // partial runs: key 0 of the panel relative to the start of the run (may be negative)
  int32_t words;   // partial runs: mask words per row
};

// Rows that are read after a call: the forward kernel asks for them between its products.
struct NextRows {
  const void* rows[2 * kStageKeys];
  int count = 0, bytes = 0;
};

// Keys and values of one head in fp32. Rows are padded with zeros to `row` floats.
struct KeyValues {
  const float* k_panels;  // [panels][D][panel_keys]
  const float* v_panels;  // backward only
  const float* k_rows;    // backward only: [keys][row]
  const float* v_rows;    // [keys], v_stride floats apart
  int64_t v_stride;
  const NextRows* next;  // forward only; or null
};

struct TileShape {
  int rows, head_dim, row;  // row = head_dim rounded up to the panel width
  int mask_row;             // row of the plan's tile at which these rows start
};

// Folded query rows against all folded keys of one head (block_mass.h): a product of `fold` slices of `head_dim`.
struct FoldedTile {
  int rows, head_dim, fold;
  const float* q;       // [fold][kTileRows][head_dim], scaled by scale*log2(e)
  const float* panels;  // [panels][fold][head_dim][panel_keys]
  int64_t keys;         // those beyond it in the last panel are not read
};

// Rows [first, last) of a tile, summed into one row of key blocks.
struct RowGroup {
  int first, last;
  double* sums;  // [ceil(keys / kv_block)]
};

struct TileKernels {
  int panel_keys;
  void (*load_row)(const void* src, DType dtype, int64_t stride, int n, float scale, float* dst);
  void (*store_row)(const float* src, int n, void* dst, DType dtype, int64_t stride);
  // `panel_keys` rows into a panel, [head_dim][panel_keys]; zeros where a row is null.
  void (*pack_panel)(const void* const* rows, DType dtype, int64_t stride, int head_dim, float* panel);
  // Online softmax of `shape.rows` queries over the listed panels. q is scaled by scale*log2(e). m (row maximum), l
  // (row sum in kSumLanes parts, of which the first panel_keys/2 are used) and o carry over from call to call.
  void (*forward)(const TileShape& shape, const float* q, const KeyValues& kv, const PanelRef* refs, int n,
                  const int32_t* mask_bits, float* scratch, float* m, float* l, float* o);
  // lse2: base-2 LSE, +inf for empty rows. Adds into dq, dk, dv (rows of shape.row floats); dk is scaled by log2(e).
  void (*backward)(const TileShape& shape, const float* q, const float* dout, const float* lse2, const float* delta,
                   const KeyValues& kv, const PanelRef* refs, int n, const int32_t* mask_bits, float* scratch,
                   float* dq, float* dk, float* dv);
  // Running base-2 maximum m and sum l (as in `forward`) of every row's scores.
  void (*score_lse)(const FoldedTile& tile, float* scratch, float* m, float* l);
  // Adds 2^(score - lse2[row]) to the groups' sums.
  void (*block_mass)(const FoldedTile& tile, const float* lse2, const RowGroup* groups, int num_groups,
                     int64_t kv_block, float* scratch);
  // Adds the softmax weights of the groups' rows to their sums. parts: 2 * rows * mass_row(key blocks) floats.
  void (*softmax_mass)(const FoldedTile& tile, const RowGroup* groups, int num_groups, int64_t kv_block, float* scratch,
                       float* parts);
};

// Sums of a row's key blocks, as many as make whole vectors.
constexpr int64_t mass_row(int64_t kv_blocks) { return (kv_blocks + kSumLanes - 1) / kSumLanes * kSumLanes; }

constexpr int kForwardScratch = kTileRows * kStageKeys;
constexpr int kBackwardScratch = 2 * kTileRows * kStageKeys;

const TileKernels& tile_kernels();  // the best set for this processor

}  // namespace vdit

// What the forward and the backward tile kernels share: bit masks over a stage of panels, and runs of adjacent panels.
#pragma once

#include "cpu/isa/vec.h"
#include "cpu/tile_kernels.h"

namespace VDIT_NS {

using vdit::kStageKeys;
using vdit::PanelRef;
using vdit::TileShape;

constexpr int kStagePanels = kStageKeys / NR;
constexpr uint32_t kAllKeys = NR == 32 ? 0xFFFFFFFFu : (1u << (NR & 31)) - 1u;

// The NR mask bits of one row that belong to a panel which starts `shift` keys after (or before) the run.
static inline uint32_t row_bits(const int32_t* row, int words, int shift) {
  uint32_t bits = 0;
  const int first = shift < 0 ? 0 : shift;
  const int lead = first - shift;  // panel keys before the run
  if (lead >= 32) return 0;
  const int w = first >> 5, s = first & 31;
  if (w < words) bits = static_cast<uint32_t>(row[w]) >> s;
  if (s != 0 && w + 1 < words) bits |= static_cast<uint32_t>(row[w + 1]) << (32 - s);
  return bits << lead;
}

// Sets the scores of keys whose bit is clear to -inf.
static inline void mask_scores(float* s, uint32_t bits) {
  const vi b = splat_i(static_cast<int32_t>(bits));
  vi lane;
  for (int i = 0; i < VL; ++i) lane[i] = static_cast<int32_t>(1u << i);
  for (int half = 0; half < 2; ++half) {
    const vi hit = (b >> (half * VL)) & lane;
    store(s + half * VL, hit != 0 ? load(s + half * VL) : splat(-kInf));
  }
}

// Masks the panels of a stage whose keys are not all readable. Scores: `rows` rows of kStageKeys.
static inline void mask_stage(const TileShape& shape, const PanelRef* refs, int n, const int32_t* mask_bits,
                              float* scores) {
  for (int p = 0; p < n; ++p) {
    const PanelRef& r = refs[p];
    float* s = scores + p * NR;
    if (r.mask < 0) {
      if (r.valid == kAllKeys) continue;
      for (int i = 0; i < shape.rows; ++i) mask_scores(s + i * kStageKeys, r.valid);
    } else {
      const int32_t* row = mask_bits + r.mask + static_cast<int64_t>(shape.mask_row) * r.words;
      for (int i = 0; i < shape.rows; ++i, row += r.words)
        mask_scores(s + i * kStageKeys, r.valid & row_bits(row, r.words, r.shift));
    }
  }
}

// Adjacent panels of a stage as one stretch of keys, without the unreadable keys at its two ends: those are never
// multiplied, so that a NaN in a neighbour that was not selected cannot leak through 0 * NaN.
struct Stretch {
  int begin;    // first panel in the stage
  int end;      // one past the last
  int column;   // first key within the stage's scores
  int64_t key;  // first key of the sequence
  int keys;
};

static inline Stretch next_stretch(const PanelRef* refs, int n, int begin) {
  constexpr uint32_t kLastKey = 1u << (NR - 1);
  int end = begin + 1;
  // Two runs in neighbouring panels with a gap between them are two stretches.
  while (end < n && refs[end].panel == refs[end - 1].panel + 1 && (refs[end - 1].valid & kLastKey) != 0 &&
         (refs[end].valid & 1u) != 0)
    ++end;
  const int head = __builtin_ctz(refs[begin].valid);  // valid is never 0
  const int tail = __builtin_clz(refs[end - 1].valid << (32 - NR));
  return {begin, end, begin * NR + head, static_cast<int64_t>(refs[begin].panel) * NR + head,
          (end - begin) * NR - head - tail};
}

}  // namespace VDIT_NS

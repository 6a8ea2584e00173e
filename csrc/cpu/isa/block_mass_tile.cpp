// Scores of a tile of folded queries against all keys, reduced as they appear: to a log-sum-exp per row, or to sums of
// weights over blocks of rows and keys, whose log-sum-exps are given or found in the same pass.
#include "cpu/isa/stage.h"

namespace VDIT_NS {

using vdit::FoldedTile;
using vdit::kTileRows;
using vdit::RowGroup;

constexpr float kLargest = 3.40282347e38f;

// Scores of the keys [first, first + width) with `first` at the start of a panel: one product per slice of the fold,
// so that a strip of queries and the panels of a stage stay in the nearest cache whatever the fold.
static void score_folded(const FoldedTile& t, int64_t first, int width, float* scores) {
  const int64_t slice = static_cast<int64_t>(t.head_dim) * NR, panel = slice * t.fold;
  const float* keys = t.panels + first / NR * panel;
  const int cols = (width + NR - 1) / NR * NR;
  gemm<false>(t.rows, cols, t.head_dim, t.q, t.head_dim, keys, NR, panel, scores, kStageKeys);
  for (int r = 1; r < t.fold; ++r) {
    const float* q = t.q + static_cast<int64_t>(r) * kTileRows * t.head_dim;
    gemm<true>(t.rows, cols, t.head_dim, q, t.head_dim, keys + r * slice, NR, panel, scores, kStageKeys);
  }
}

static inline int stage_width(const FoldedTile& t, int64_t first) {
  return static_cast<int>(t.keys - first < kStageKeys ? t.keys - first : kStageKeys);
}

// The scores of keys beyond the last become -inf.
static inline void mask_tail(const FoldedTile& t, int width, float* scores) {
  const int rest = width % NR;
  if (rest == 0) return;
  for (int i = 0; i < t.rows; ++i) mask_scores(scores + i * kStageKeys + width - rest, (1u << rest) - 1);
}

static inline float row_max(const float* s, int width) {
  vf top = load(s);
  for (int j = VL; j < width; j += VL) top = max_or_second(load(s + j), top);
  return reduce_max(top);
}

// A maximum of +inf becomes the largest number, so that no difference is inf - inf: a score of +inf then weighs +inf,
// and only NaN makes NaN.
void score_lse_tile(const FoldedTile& t, float* scores, float* m, float* l) {
  for (int64_t first = 0; first < t.keys; first += kStageKeys) {
    const int width = stage_width(t, first);
    score_folded(t, first, width, scores);
    mask_tail(t, width, scores);
    for (int i = 0; i < t.rows; ++i) {
      const float* s = scores + i * kStageKeys;
      float* sum = l + i * vdit::kSumLanes;
      vf top = load(s);
      for (int j = VL; j < width; j += VL) top = max_or_second(load(s + j), top);
      if (any_greater(top, splat(m[i]))) {
        const float highest = reduce_max(top), new_max = highest < kLargest ? highest : kLargest;
        const float shrink = m[i] == -kInf ? 0.f : exp2_nonpositive(splat(m[i] - new_max))[0];
        m[i] = new_max;
        store(sum, load(sum) * shrink);
      }
      const vf shift = splat(m[i] == -kInf ? 0.f : m[i]);
      vf total = load(sum);
      if (m[i] < kLargest)
        for (int j = 0; j < width; j += VL) total += exp2_nonpositive(load(s + j) - shift);
      else
        for (int j = 0; j < width; j += VL) total += exp2_any(load(s + j) - shift);
      store(sum, total);
    }
  }
}

// columns[j] = sum of row i's weight of key j over the group's rows. Two vectors at a time hide the additions' latency.
static inline void sum_rows(const RowGroup& g, const float* lse2, const float* scores, int width, float* columns) {
  for (int j = 0; j < width; j += NR) {
    vf low{}, high{};
    for (int i = g.first; i < g.last; ++i) {
      const float* s = scores + i * kStageKeys + j;
      const vf norm = splat(lse2[i]);
      low += exp2_any(load(s) - norm);
      high += exp2_any(load(s + VL) - norm);
    }
    store(columns + j, low);
    store(columns + j + VL, high);
  }
}

static inline float sum_columns(const float* columns, int n) {
  float total = 0;
  int j = 0;
  if (n >= VL) {
    vf sum{};
    for (; j + VL <= n; j += VL) sum += load(columns + j);
    total = reduce_sum(sum);
  }
  for (; j < n; ++j) total += columns[j];
  return total;
}

// Where a key block ends within the stage that begins at key `first`.
static inline int block_end(int64_t block, int64_t kv_block, int64_t first, int width) {
  const int64_t border = (block + 1) * kv_block - first;
  return border < width ? static_cast<int>(border) : width;
}

void block_mass_tile(const FoldedTile& t, const float* lse2, const RowGroup* groups, int num_groups, int64_t kv_block,
                     float* scores) {
  float columns[kStageKeys];
  for (int64_t first = 0; first < t.keys; first += kStageKeys) {
    const int width = stage_width(t, first);
    score_folded(t, first, width, scores);
    for (int g = 0; g < num_groups; ++g) {
      sum_rows(groups[g], lse2, scores, width, columns);
      int64_t block = first / kv_block;
      for (int j = 0; j < width; ++block) {
        const int end = block_end(block, kv_block, first, width);
        groups[g].sums[block] += sum_columns(columns + j, end - j);
        j = end;
      }
    }
  }
}

// One row's weights over a stage, relative to its maximum so far, added up per key block; tops: what each sum is
// relative to.
static inline void add_stage(float* s, int64_t first, int width, int64_t kv_block, float* m, float* parts,
                             float* tops) {
  const float highest = row_max(s, width), top = highest < kLargest ? highest : kLargest;
  if (!(top <= *m)) *m = top;
  const vf shift = splat(*m == -kInf ? 0.f : *m);
  for (int j = 0; j < width; j += VL) store(s + j, exp2_any(load(s + j) - shift));
  int64_t block = first / kv_block;
  for (int j = 0; j < width; ++block) {
    const int end = block_end(block, kv_block, first, width);
    const float sum = sum_columns(s + j, end - j);
    if (block * kv_block >= first)
      parts[block] = sum;
    else if (tops[block] == *m)
      parts[block] += sum;
    else
      parts[block] = parts[block] * exp2_nonpositive(splat(tops[block] - *m))[0] + sum;
    tops[block] = *m;
    j = end;
  }
}

// Sums relative to their own maxima become shares of the row's total. A row without a finite score has shares of 0.
static inline void normalise(int64_t row, float m, float* parts, const float* tops) {
  const vf shift = splat(m == -kInf ? 0.f : m);
  vf total{};
  for (int64_t b = 0; b < row; b += VL) {
    const vf weight = load(parts + b) * exp2_nonpositive(load(tops + b) - shift);
    store(parts + b, weight);
    total += weight;
  }
  const float sum = reduce_sum(total);
  const vf share = splat(sum == 0.f ? 0.f : 1.f / sum);
  for (int64_t b = 0; b < row; b += VL) store(parts + b, load(parts + b) * share);
}

void softmax_mass_tile(const FoldedTile& t, const RowGroup* groups, int num_groups, int64_t kv_block, float* scores,
                       float* parts) {
  const int64_t blocks = (t.keys + kv_block - 1) / kv_block, row = vdit::mass_row(blocks);
  float* tops = parts + t.rows * row;
  float m[kTileRows];
  for (int i = 0; i < t.rows; ++i) {
    m[i] = -kInf;
    for (int64_t b = blocks; b < row; ++b) {
      parts[i * row + b] = 0.f;
      tops[i * row + b] = -kInf;
    }
  }
  for (int64_t first = 0; first < t.keys; first += kStageKeys) {
    const int width = stage_width(t, first);
    score_folded(t, first, width, scores);
    mask_tail(t, width, scores);
    for (int i = 0; i < t.rows; ++i)
      add_stage(scores + i * kStageKeys, first, width, kv_block, m + i, parts + i * row, tops + i * row);
  }
  for (int i = 0; i < t.rows; ++i) normalise(row, m[i], parts + i * row, tops + i * row);
  for (int g = 0; g < num_groups; ++g) {
    for (int64_t b = 0; b < row; b += VL) {
      vf sum{};
      for (int i = groups[g].first; i < groups[g].last; ++i) sum += load(parts + i * row + b);
      for (int64_t j = b; j < b + VL && j < blocks; ++j) groups[g].sums[j] += sum[j - b];
    }
  }
}

}  // namespace VDIT_NS

// Attention of one tile of queries over a list of key panels, forward and backward.
#include "cpu/isa/stage.h"

namespace VDIT_NS {

using vdit::KeyValues;

template <class Between = Nothing>
static void score_stage(const TileShape& shape, const float* a, int lda, const float* panels, const PanelRef* refs,
                        int n, float* scores, Between between = {}) {
  const int64_t panel_size = static_cast<int64_t>(shape.head_dim) * NR;
  for (int p = 0; p < n;) {
    int end = p + 1;
    while (end < n && refs[end].panel == refs[end - 1].panel + 1) ++end;
    gemm<false>(shape.rows, (end - p) * NR, shape.head_dim, a, lda, panels + refs[p].panel * panel_size, NR, panel_size,
                scores + p * NR, kStageKeys, between);
    p = end;
  }
}

// Asks for the rows that are read next, a few per block of a product. Rows of one head are mostly not neighbours, which
// hardware prefetchers do not follow, and many at once wait for each other.
struct Asker {
  const vdit::NextRows* next;
  int step, at = 0;

  Asker(const vdit::NextRows* rows, int calls)
      : next(rows), step(rows == nullptr ? 0 : (rows->count + calls - 1) / calls) {}
  void operator()() {
    for (int i = 0; i < step && at < next->count; ++i, ++at)
      for (int b = 0; b < next->bytes; b += 64) __builtin_prefetch(static_cast<const char*>(next->rows[at]) + b);
  }
};

void attention_forward_tile(const TileShape& shape, const float* q, const KeyValues& kv, const PanelRef* refs, int n,
                            const int32_t* mask_bits, float* scores, float* m, float* l, float* o) {
  const int row = shape.row;
  for (int first = 0; first < n; first += kStagePanels) {
    const PanelRef* stage = refs + first;
    const int panels = n - first < kStagePanels ? n - first : kStagePanels;
    const int width = panels * NR;
    Asker asker(kv.next, (shape.rows + MR - 1) / MR * (panels + row / NR));
    const auto ask = [&] { asker(); };
    score_stage(shape, q, row, kv.k_panels, stage, panels, scores, ask);
    mask_stage(shape, stage, panels, mask_bits, scores);
    for (int i = 0; i < shape.rows; ++i) {
      float* s = scores + i * kStageKeys;
      float* sum = l + i * vdit::kSumLanes;
      vf top = load(s);
      for (int j = VL; j < width; j += VL) top = max_or_second(load(s + j), top);
      if (any_greater(top, splat(m[i]))) {
        const float new_max = reduce_max(top);
        const float a = m[i] == -kInf ? 0.f : exp2_nonpositive(splat(m[i] - new_max))[0];
        m[i] = new_max;
        store(sum, load(sum) * a);
        float* oi = o + static_cast<int64_t>(i) * row;
        for (int j = 0; j < row; j += VL) store(oi + j, load(oi + j) * a);
      }
      const vf shift = splat(m[i] == -kInf ? 0.f : m[i]);
      vf total = load(sum);
      for (int j = 0; j < width; j += VL) {
        const vf e = exp2_nonpositive(load(s + j) - shift);
        total += e;
        store(s + j, e);
      }
      store(sum, total);
    }
    for (int p = 0; p < panels;) {
      const Stretch t = next_stretch(stage, panels, p);
      gemm<true>(shape.rows, row, t.keys, scores + t.column, kStageKeys, kv.v_rows + t.key * kv.v_stride, kv.v_stride,
                 NR, o, row, ask);
      p = t.end;
    }
  }
}

void attention_backward_tile(const TileShape& shape, const float* q, const float* dout, const float* lse2,
                             const float* delta, const KeyValues& kv, const PanelRef* refs, int n,
                             const int32_t* mask_bits, float* scratch, float* dq, float* dk, float* dv) {
  const int row = shape.row;
  float* scores = scratch;
  float* dscores = scratch + vdit::kTileRows * kStageKeys;
  for (int first = 0; first < n; first += kStagePanels) {
    const PanelRef* stage = refs + first;
    const int panels = n - first < kStagePanels ? n - first : kStagePanels;
    const int width = panels * NR;
    score_stage(shape, q, row, kv.k_panels, stage, panels, scores);
    score_stage(shape, dout, row, kv.v_panels, stage, panels, dscores);
    mask_stage(shape, stage, panels, mask_bits, scores);
    for (int i = 0; i < shape.rows; ++i) {
      float* s = scores + i * kStageKeys;
      float* d = dscores + i * kStageKeys;
      const vf norm = splat(lse2[i]), dot = splat(delta[i]);
      for (int j = 0; j < width; j += VL) {
        const vf x = load(s + j) - norm;
        const vf p = exp2_nonpositive(x);
        store(s + j, p);
        store(d + j, p == 0.f ? vf{} : p * (load(d + j) - dot));
      }
    }
    for (int p = 0; p < panels;) {
      const Stretch t = next_stretch(stage, panels, p);
      gemm<true>(shape.rows, row, t.keys, dscores + t.column, kStageKeys, kv.k_rows + t.key * row, row, NR, dq, row);
      gemm<true, true>(t.keys, row, shape.rows, scores + t.column, kStageKeys, dout, row, NR, dv + t.key * row, row);
      gemm<true, true>(t.keys, row, shape.rows, dscores + t.column, kStageKeys, q, row, NR, dk + t.key * row, row);
      p = t.end;
    }
  }
}

}  // namespace VDIT_NS

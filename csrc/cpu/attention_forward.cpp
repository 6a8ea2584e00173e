// softmax(q k^T) v over the plan's runs: heads are packed a few at a time, tiles are drawn longest first.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/attention_pack.h"
#include "cpu/attention_plan.h"

namespace vdit {

namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr int64_t kFewReads = 4;
constexpr int64_t kLargeFloats = int64_t{2} << 20;  // 8 MiB

// Packing all keys first writes and reads fp32 through memory, and pays where many items read a key. Keys that are read
// once on the average are packed by their items instead, a stage at a time, which stays in the caches; and so are those
// read up to kFewReads times if they do not stay in the caches themselves, unless v would be read in place.
void choose_packing(const TileIndex& tiles, const TileKernels& kernels, int head_dim, std::vector<Source>* sources) {
  const int row = round_up(head_dim, kernels.panel_keys);
  for (Source& source : *sources) {
    Reads sum;
    for (int64_t h = source.head_begin; h < source.head_end; ++h) {
      const Reads reads = tiles.reads(source.batch, h);
      sum.items += reads.items;
      sum.panels += reads.panels;
    }
    for (size_t i = 0; i < source.sequences.size(); ++i) {
      PackedSequence& s = source.sequences[i];
      const int64_t panels = (s.length + kernels.panel_keys - 1) / kernels.panel_keys;
      const bool large = PackedSequence::floats(kernels, s.length, head_dim, row, false) >= kLargeFloats;
      const int64_t few = large && !s.direct_v(head_dim, row) ? kFewReads : 1;
      s.whole = (i == 0 ? sum.panels : sum.items * panels) > few * panels;
    }
  }
}

struct Scratch {
  std::vector<float> q, scores, o, stage;
  std::vector<PanelRef> refs;
  float m[kTileRows], l[kTileRows * kSumLanes];
};

void run_item(const AttentionParams& p, const ForwardOutputs& out, const Source& source, const WorkItem& item,
              Scratch* s) {
  const TileKernels& kernels = tile_kernels();
  const int head_dim = static_cast<int>(p.q.size[3]), row = round_up(head_dim, kernels.panel_keys);
  const int64_t lq = p.q.size[1], heads = p.q.size[2];
  s->q.resize(static_cast<size_t>(kTileRows) * row);
  s->o.resize(s->q.size());
  s->scores.resize(kForwardScratch);
  s->stage.resize(static_cast<size_t>(stage_floats(head_dim, row)));
  const int32_t* order = p.plan.q_order.row(item.batch, item.head);
  auto token = [&](int r) -> int64_t { return order != nullptr ? order[item.q_start + r] : item.q_start + r; };
  for (int r = 0; r < item.rows; ++r) {
    float* q = s->q.data() + static_cast<int64_t>(r) * row;
    kernels.load_row(row_of(p.q, item.batch, token(r), item.head), p.q.dtype, p.q.stride[3], head_dim, p.scale * kLog2e,
                     q);
    std::fill(q + head_dim, q + row, 0.f);
    s->m[r] = -kInf;
  }
  std::fill(s->l, s->l + item.rows * kSumLanes, 0.f);
  std::fill(s->o.begin(), s->o.begin() + static_cast<int64_t>(item.rows) * row, 0.f);

  const TileShape shape{item.rows, head_dim, row, item.mask_row};
  for (size_t i = 0; i < source.sequences.size(); ++i) {
    const PackedSequence& keys = source.sequences[i];
    if (i == 0) {
      list_panels(p.plan, item.tile, kernels.panel_keys, keys.valid.data(), &s->refs);
    } else {
      list_all_panels(keys.panels, keys.valid.data(), &s->refs);
    }
    const int count = static_cast<int>(s->refs.size()), step = keys.whole ? count : kStageKeys / kernels.panel_keys;
    for (int first = 0; first < count; first += step) {
      PanelRef* refs = s->refs.data() + first;
      const int n = std::min(step, count - first);
      KeyValues kv = keys.kv;
      NextRows next;
      if (!keys.whole) {
        kv = keys.pack_stage(kernels, head_dim, row, refs, n, s->stage.data());
        keys.list_rows(kernels, head_dim, refs + n, std::min(step, count - first - n), &next);
        kv.next = &next;
      }
      kernels.forward(shape, s->q.data(), kv, refs, n, p.plan.mask_bits, s->scores.data(), s->m, s->l, s->o.data());
    }
  }

  for (int r = 0; r < item.rows; ++r) {
    const int64_t t = token(r), at = (item.batch * heads + item.head) * lq + t;
    float* o = s->o.data() + static_cast<int64_t>(r) * row;
    const float* lanes = s->l + r * kSumLanes;
    const float sum = std::accumulate(lanes, lanes + kSumLanes, 0.f);
    const bool empty = s->m[r] == -kInf && sum == 0.f;
    float scale = empty ? 0.f : 1.f / sum;
    if (p.row_scale != nullptr && !empty) scale *= p.row_scale[at];
    for (int d = 0; d < head_dim; ++d) o[d] *= scale;
    kernels.store_row(o, head_dim, row_of_mut(out.out, item.batch, t, item.head), out.out.dtype, out.out.stride[3]);
    out.lse[at] = empty ? -kInf : (s->m[r] + std::log2(sum)) * kLn2;
  }
}

}  // namespace

void attention_forward_cpu(const AttentionParams& p, const ForwardOutputs& out, const ParallelFor& parallel) {
  std::vector<Source> sources = list_sources(p, false);
  const TileKernels& kernels = tile_kernels();
  const TileIndex tiles(p.plan, kernels.panel_keys);
  choose_packing(tiles, kernels, static_cast<int>(p.q.size[3]), &sources);
  for (size_t begin = 0; begin < sources.size();) {
    const size_t end = begin + sources_in_budget(p, sources, begin);
    pack_sources(p, &sources, begin, end, parallel);
    std::vector<WorkItem> items;
    for (size_t i = begin; i < end; ++i)
      for (int64_t h = sources[i].head_begin; h < sources[i].head_end; ++h)
        tiles.append_items(sources[i].batch, h, static_cast<int32_t>(i), &items);
    std::stable_sort(items.begin(), items.end(), [](const WorkItem& a, const WorkItem& b) { return a.cost > b.cost; });
    parallel(static_cast<int64_t>(items.size()), [&](int64_t i) {
      static thread_local Scratch scratch;
      const WorkItem& item = items[static_cast<size_t>(i)];
      run_item(p, out, sources[static_cast<size_t>(item.source)], item, &scratch);
    });
    for (size_t i = begin; i < end; ++i) sources[i].sequences.clear();
    begin = end;
  }
}

}  // namespace vdit

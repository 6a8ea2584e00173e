// Gradients of attention over the plan's runs. Scores are computed again tile by tile from the saved LSE.
//
// dk and dv of one key/value head are summed over its tiles in a fixed number of partial sums (a function of the
// problem, never of the thread count), which are then added in order: the result does not depend on scheduling.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "cpu/attention_pack.h"
#include "cpu/attention_plan.h"

namespace vdit {

namespace {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr size_t kTasks = 16;                        // partial sums aimed at per group of sources
constexpr size_t kPartialFloats = size_t{64} << 20;  // and their size at most, unless one alone is larger

struct Scratch {
  std::vector<float> q, dout, dq, out, scores;
  std::vector<PanelRef> refs;
  float lse2[kTileRows], delta[kTileRows];
};

// The partial sums of one task: dk then dv of every sequence of its source.
struct Partial {
  std::unique_ptr<float[]> memory;
  std::vector<float*> dk, dv;

  Partial(const Source& source, int panel_keys, int row) {
    int64_t total = 0;
    for (const PackedSequence& s : source.sequences) total += 2 * s.panels * panel_keys * row;
    memory.reset(new float[static_cast<size_t>(std::max<int64_t>(total, 1))]());
    float* next = memory.get();
    for (const PackedSequence& s : source.sequences) {
      dk.push_back(next);
      next += s.panels * panel_keys * row;
      dv.push_back(next);
      next += s.panels * panel_keys * row;
    }
  }
};

void run_item(const AttentionParams& p, const BackwardInputs& in, const BackwardOutputs& out, const Source& source,
              const WorkItem& item, const Partial& partial, Scratch* s) {
  const TileKernels& kernels = tile_kernels();
  const int head_dim = static_cast<int>(p.q.size[3]), row = round_up(head_dim, kernels.panel_keys);
  const int64_t lq = p.q.size[1], heads = p.q.size[2];
  for (auto* v : {&s->q, &s->dout, &s->dq, &s->out}) v->assign(static_cast<size_t>(kTileRows) * row, 0.f);
  s->scores.resize(kBackwardScratch);
  const int32_t* order = p.plan.q_order.row(item.batch, item.head);
  auto token = [&](int r) -> int64_t { return order != nullptr ? order[item.q_start + r] : item.q_start + r; };
  auto load = [&](const View4& t, int64_t n, float scale, float* dst) {
    kernels.load_row(row_of(t, item.batch, n, item.head), t.dtype, t.stride[3], head_dim, scale, dst);
  };
  for (int r = 0; r < item.rows; ++r) {
    const int64_t t = token(r), at = (item.batch * heads + item.head) * lq + t, offset = static_cast<int64_t>(r) * row;
    float* dout = s->dout.data() + offset;
    const float* o = s->out.data() + offset;
    load(p.q, t, p.scale * kLog2e, s->q.data() + offset);
    load(in.dout, t, 1.f, dout);
    load(in.out, t, 1.f, s->out.data() + offset);
    // out already holds the row scale, so sum(dout * out) is what sum(scaled dout * unscaled out) would be.
    float delta = 0.f;
    for (int d = 0; d < head_dim; ++d) delta += dout[d] * o[d];
    if (in.dlse != nullptr && in.lse[at] != -kInf) delta -= in.dlse[at];
    s->delta[r] = delta;
    s->lse2[r] = in.lse[at] == -kInf ? kInf : in.lse[at] * kLog2e;
    if (p.row_scale != nullptr)
      for (int d = 0; d < head_dim; ++d) dout[d] *= p.row_scale[at];
  }
  const TileShape shape{item.rows, head_dim, row, item.mask_row};
  for (size_t i = 0; i < source.sequences.size(); ++i) {
    const PackedSequence& keys = source.sequences[i];
    if (i == 0) {
      list_panels(p.plan, item.tile, kernels.panel_keys, keys.valid.data(), &s->refs);
    } else {
      list_all_panels(keys.panels, keys.valid.data(), &s->refs);
    }
    kernels.backward(shape, s->q.data(), s->dout.data(), s->lse2, s->delta, keys.kv, s->refs.data(),
                     static_cast<int>(s->refs.size()), p.plan.mask_bits, s->scores.data(), s->dq.data(), partial.dk[i],
                     partial.dv[i]);
  }
  for (int r = 0; r < item.rows; ++r) {
    float* dq = s->dq.data() + static_cast<int64_t>(r) * row;
    for (int d = 0; d < head_dim; ++d) dq[d] *= p.scale;
    kernels.store_row(dq, head_dim, row_of_mut(out.dq, item.batch, token(r), item.head), out.dq.dtype,
                      out.dq.stride[3]);
  }
}

// Adds `count` partial sums of one source into the fp32 gradients, in order.
void reduce(const Source& source, const std::vector<Partial>& partials, size_t first, size_t count, int head_dim,
            int row, const BackwardOutputs& out) {
  for (size_t i = 0; i < source.sequences.size(); ++i) {
    const PackedSequence& s = source.sequences[i];
    const View4& dk = i == 0 ? out.dk : out.segments[i - 1].k;
    const View4& dv = i == 0 ? out.dv : out.segments[i - 1].v;
    for (int64_t n = 0; n < s.length; ++n) {
      const int64_t token = s.order != nullptr ? s.order[n] : n;
      auto* k = reinterpret_cast<float*>(row_of_mut(dk, s.batch, token, s.head));
      auto* v = reinterpret_cast<float*>(row_of_mut(dv, s.batch, token, s.head));
      for (size_t c = first; c < first + count; ++c) {
        const float* pk = partials[c].dk[i] + n * row;
        const float* pv = partials[c].dv[i] + n * row;
        for (int d = 0; d < head_dim; ++d) {
          k[d] += pk[d] * kLn2;  // the kernel worked with q * log2(e)
          v[d] += pv[d];
        }
      }
    }
  }
}

}  // namespace

void attention_backward_cpu(const AttentionParams& p, const BackwardInputs& in, const BackwardOutputs& out,
                            const ParallelFor& parallel) {
  const TileKernels& kernels = tile_kernels();
  const int head_dim = static_cast<int>(p.q.size[3]), row = round_up(head_dim, kernels.panel_keys);
  std::vector<Source> sources = list_sources(p, true);
  const TileIndex tiles(p.plan, kernels.panel_keys);
  for (size_t begin = 0; begin < sources.size();) {
    // A group holds at most kTasks sources: each brings at least one set of partial sums.
    const size_t count = std::max<size_t>(1, std::min(sources_in_budget(p, sources, begin), kTasks));
    const size_t end = begin + count;
    pack_sources(p, &sources, begin, end, parallel);
    size_t floats = 1;  // of one set of partial sums of every source
    for (size_t i = begin; i < end; ++i)
      for (const PackedSequence& s : sources[i].sequences)
        floats += static_cast<size_t>(2 * s.panels * kernels.panel_keys * row);
    const size_t split = std::max<size_t>(1, std::min(kTasks / count, kPartialFloats / floats));
    std::vector<std::vector<WorkItem>> work(count * split);
    std::vector<Partial> partials;
    for (size_t i = begin; i < end; ++i) {
      std::vector<WorkItem> items;
      for (int64_t h = sources[i].head_begin; h < sources[i].head_end; ++h)
        tiles.append_items(sources[i].batch, h, static_cast<int32_t>(i), &items);
      for (size_t j = 0; j < items.size(); ++j) work[(i - begin) * split + j % split].push_back(items[j]);
      for (size_t c = 0; c < split; ++c) partials.emplace_back(sources[i], kernels.panel_keys, row);
    }
    parallel(static_cast<int64_t>(work.size()), [&](int64_t i) {
      static thread_local Scratch scratch;
      for (const WorkItem& item : work[static_cast<size_t>(i)])
        run_item(p, in, out, sources[static_cast<size_t>(item.source)], item, partials[static_cast<size_t>(i)],
                 &scratch);
    });
    // One after the other: a segment shared by the batch is added to by several sources.
    for (size_t i = begin; i < end; ++i) {
      reduce(sources[i], partials, (i - begin) * split, split, head_dim, row, out);
      sources[i].sequences.clear();
    }
    begin = end;
  }
}

}  // namespace vdit

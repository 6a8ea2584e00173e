// Keys are packed a few heads at a time. A work item owns whole blocks of queries, so that every sum has one owner and
// one order.
#include "cpu/block_mass.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "cpu/attention_pack.h"
#include "cpu/tile_kernels.h"

namespace vdit {

namespace {

constexpr int64_t kBudgetFloats = int64_t{48} << 20;  // 192 MiB of packed keys at a time
constexpr int64_t kPanelsPerTask = 64;
constexpr double kLog2e = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;
constexpr float kInf = std::numeric_limits<float>::infinity();

// Packed keys of one key head, and the query heads that read them.
struct KeyHead {
  int64_t batch = 0, head = 0, rows = 0, keys = 0;  // rows of k that exist, and the folded keys they make
  std::unique_ptr<float[]> panels;
};

int64_t panel_floats(const ScoreParams& p) { return p.fold * p.k.size[3] * tile_kernels().panel_keys; }

int64_t panel_count(const KeyHead& h) {
  const int64_t n = tile_kernels().panel_keys;
  return (h.keys + n - 1) / n;
}

void pack_panel(const ScoreParams& p, const KeyHead& h, int64_t panel) {
  const TileKernels& kernels = tile_kernels();
  const int dim = static_cast<int>(p.k.size[3]), keys = kernels.panel_keys;
  float* to = h.panels.get() + panel * panel_floats(p);
  for (int64_t r = 0; r < p.fold; ++r, to += static_cast<int64_t>(dim) * keys) {
    const void* rows[kMaxPanelKeys];
    for (int j = 0; j < keys; ++j) {
      const int64_t token = (panel * keys + j) * p.fold + r;
      rows[j] = token < h.rows ? row_of(p.k, h.batch, token, h.head) : nullptr;
    }
    kernels.pack_panel(rows, p.k.dtype, p.k.stride[3], dim, to);
  }
}

void pack(const ScoreParams& p, std::vector<KeyHead>* heads, const ParallelFor& parallel) {
  struct Task {
    const KeyHead* head;
    int64_t first, last;
  };
  std::vector<Task> tasks;
  for (KeyHead& h : *heads) {
    const int64_t panels = panel_count(h);
    h.panels.reset(new float[static_cast<size_t>(std::max<int64_t>(panels * panel_floats(p), 1))]);
    const int64_t step = std::max<int64_t>(1, kPanelsPerTask / p.fold);
    for (int64_t i = 0; i < panels; i += step) tasks.push_back({&h, i, std::min(panels, i + step)});
  }
  parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& t = tasks[static_cast<size_t>(i)];
    for (int64_t panel = t.first; panel < t.last; ++panel) pack_panel(p, *t.head, panel);
  });
}

// Calls work(key head, query head, i) for every query head and i in [0, items), in parallel; groups of key heads whose
// packed keys fit the budget come one after another.
template <class Work>
void for_each_item(const ScoreParams& p, int64_t items, const ParallelFor& parallel, const Work& work) {
  const int64_t kv_heads = p.k.size[2], group = p.q.size[2] / kv_heads, sources = p.q.size[0] * kv_heads;
  for (int64_t next = 0; next < sources;) {
    std::vector<KeyHead> heads;
    for (int64_t used = 0; next < sources; ++next) {
      KeyHead h;
      h.batch = next / kv_heads;
      h.head = next % kv_heads;
      h.rows = p.kv_len == nullptr ? p.k.size[1] : p.kv_len[h.batch];
      h.keys = (h.rows + p.fold - 1) / p.fold;
      used += panel_count(h) * panel_floats(p);
      if (used > kBudgetFloats && !heads.empty()) break;
      heads.push_back(std::move(h));
    }
    pack(p, &heads, parallel);
    parallel(static_cast<int64_t>(heads.size()) * group * items, [&](int64_t n) {
      const KeyHead& h = heads[static_cast<size_t>(n / (group * items))];
      work(h, h.head * group + n / items % group, n % items);
    });
  }
}

// Kept by every thread from item to item, unless it is large.
struct Scratch {
  static constexpr size_t kKeptBytes = size_t{4} << 20;

  std::vector<float> q, scores, parts;
  std::vector<double> sums;
  std::vector<RowGroup> groups;
  std::vector<int64_t> live;
  float m[kTileRows], l[kTileRows * kSumLanes];

  void release() {
    if (q.capacity() * sizeof(float) > kKeptBytes) std::vector<float>().swap(q);
    if (parts.capacity() * sizeof(float) > kKeptBytes) std::vector<float>().swap(parts);
    if (sums.capacity() * sizeof(double) > kKeptBytes) std::vector<double>().swap(sums);
    if (live.capacity() * sizeof(int64_t) > kKeptBytes) std::vector<int64_t>().swap(live);
  }
};

// Folded queries rows[0 .. n) of a head into the layout of the tile kernels.
FoldedTile load_queries(const ScoreParams& p, const KeyHead& h, int64_t head, const int64_t* rows, int n, Scratch* s) {
  const TileKernels& kernels = tile_kernels();
  const int dim = static_cast<int>(p.q.size[3]);
  s->q.resize(static_cast<size_t>(p.fold) * kTileRows * dim);
  s->scores.resize(kForwardScratch);
  const int64_t end = p.q_len == nullptr ? p.q.size[1] : p.q_len[h.batch];
  for (int64_t r = 0; r < p.fold; ++r) {
    for (int i = 0; i < n; ++i) {
      float* to = s->q.data() + (r * kTileRows + i) * dim;
      const int64_t token = rows[i] * p.fold + p.fold - 1 - r;
      if (token < end)
        kernels.load_row(row_of(p.q, h.batch, token, head), p.q.dtype, p.q.stride[3], dim,
                         static_cast<float>(p.scale * kLog2e), to);
      else
        std::fill_n(to, dim, 0.f);
    }
  }
  return {n, dim, static_cast<int>(p.fold), s->q.data(), h.panels.get(), h.keys};
}

}  // namespace

void score_lse_cpu(const ScoreParams& p, float* lse, const ParallelFor& parallel) {
  const int64_t queries = p.queries(), items = (queries + kTileRows - 1) / kTileRows;
  for_each_item(p, items, parallel, [&](const KeyHead& h, int64_t head, int64_t item) {
    static thread_local Scratch s;
    int64_t rows[kTileRows];
    const int64_t first = item * kTileRows;
    const int n = static_cast<int>(std::min<int64_t>(kTileRows, queries - first));
    std::iota(rows, rows + n, first);
    std::fill_n(s.m, n, -kInf);
    std::fill_n(s.l, n * kSumLanes, 0.f);
    const FoldedTile tile = load_queries(p, h, head, rows, n, &s);
    tile_kernels().score_lse(tile, s.scores.data(), s.m, s.l);
    float* to = lse + (h.batch * p.q.size[2] + head) * queries + first;
    for (int i = 0; i < n; ++i) {
      const float* lanes = s.l + i * kSumLanes;
      const double sum = std::accumulate(lanes, lanes + kSumLanes, 0.0);
      const bool empty = s.m[i] == -kInf && sum == 0;
      to[i] = empty ? -kInf : static_cast<float>((s.m[i] + std::log2(sum)) * kLn2);
    }
    s.release();
  });
}

namespace {

// mass of whole blocks of queries per work item. live(batch, head, i): whether folded query i has a weight;
// run(key head, head, tile, rows, scratch) adds the weights of a tile of such queries to the sums of scratch.groups.
template <class Live, class Run>
void sum_over_blocks(const BlockMassParams& p, float* mass, const ParallelFor& parallel, const Live& live,
                     const Run& run) {
  const ScoreParams& scores = p.scores;
  const int64_t queries = scores.queries(), q_blocks = (queries + p.q_block - 1) / p.q_block;
  const int64_t kv_blocks = (scores.keys() + p.kv_block - 1) / p.kv_block;
  const int64_t per_item = std::max<int64_t>(1, kTileRows / p.q_block);
  const int64_t items = (q_blocks + per_item - 1) / per_item;
  for_each_item(scores, items, parallel, [&](const KeyHead& h, int64_t head, int64_t item) {
    static thread_local Scratch s;
    const int64_t first_block = item * per_item, end_block = std::min(q_blocks, first_block + per_item);
    s.sums.assign(static_cast<size_t>((end_block - first_block) * kv_blocks), 0.0);
    s.live.clear();  // rows of weight 0 are not computed
    for (int64_t i = first_block * p.q_block; i < std::min(queries, end_block * p.q_block); ++i)
      if (live(h.batch, head, i)) s.live.push_back(i);
    // Even parts: a last part of a few rows would leave most of a micro-kernel idle.
    const auto count = static_cast<int64_t>(s.live.size()), parts = (count + kTileRows - 1) / kTileRows;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = count * part / parts;
      const int64_t* rows = s.live.data() + begin;
      const int n = static_cast<int>(count * (part + 1) / parts - begin);
      s.groups.clear();
      for (int i = 0; i < n; ++i) {
        const int64_t block = rows[i] / p.q_block;
        if (i > 0 && rows[i - 1] / p.q_block == block)
          ++s.groups.back().last;
        else
          s.groups.push_back({i, i + 1, s.sums.data() + (block - first_block) * kv_blocks});
      }
      run(h, head, load_queries(scores, h, head, rows, n, &s), rows, &s);
    }
    float* to = mass + ((h.batch * scores.q.size[2] + head) * q_blocks + first_block) * kv_blocks;
    for (size_t i = 0; i < s.sums.size(); ++i) to[i] = static_cast<float>(s.sums[i]);
    s.release();
  });
}

}  // namespace

void block_mass_cpu(const BlockMassParams& p, float* mass, const ParallelFor& parallel) {
  const int64_t heads = p.scores.q.size[2], queries = p.scores.queries();
  const auto row_lse = [&](int64_t batch, int64_t head) { return p.lse + (batch * heads + head) * queries; };
  const auto live = [&](int64_t batch, int64_t head, int64_t i) { return row_lse(batch, head)[i] != -kInf; };
  sum_over_blocks(p, mass, parallel, live,
                  [&](const KeyHead& h, int64_t head, const FoldedTile& tile, const int64_t* rows, Scratch* s) {
                    const float* lse = row_lse(h.batch, head);
                    for (int i = 0; i < tile.rows; ++i) s->m[i] = static_cast<float>(lse[rows[i]] * kLog2e);
                    tile_kernels().block_mass(tile, s->m, s->groups.data(), static_cast<int>(s->groups.size()),
                                              p.kv_block, s->scores.data());
                  });
}

void softmax_mass_cpu(const BlockMassParams& p, float* mass, const ParallelFor& parallel) {
  const ScoreParams& scores = p.scores;
  const auto live = [&](int64_t batch, int64_t, int64_t i) {
    return scores.q_len == nullptr || i * scores.fold < scores.q_len[batch];
  };
  sum_over_blocks(p, mass, parallel, live,
                  [&](const KeyHead& h, int64_t, const FoldedTile& tile, const int64_t*, Scratch* s) {
                    const int64_t blocks = (h.keys + p.kv_block - 1) / p.kv_block;
                    s->parts.resize(static_cast<size_t>(2 * tile.rows * mass_row(blocks)));
                    tile_kernels().softmax_mass(tile, s->groups.data(), static_cast<int>(s->groups.size()), p.kv_block,
                                                s->scores.data(), s->parts.data());
                  });
}

}  // namespace vdit

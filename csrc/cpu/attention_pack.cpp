#include "cpu/attention_pack.h"

#include <algorithm>

#include "cpu/pages.h"

namespace vdit {

namespace {
constexpr int64_t kBudgetFloats = int64_t{48} << 20;  // 192 MiB of packed keys and values at a time
constexpr int64_t kPanelsPerTask = 64;
constexpr size_t kLargeBytes = size_t{32}
                               << 20;  // glibc maps such memory anew each time, and its faults take as long as packing

// Keys that do not exist are zeros, so that whatever lies there cannot reach a product.
void load_rows(const TileKernels& kernels, const void* const* rows, const View4& t, int head_dim, int row, float* dst) {
  for (int j = 0; j < kernels.panel_keys; ++j, dst += row) {
    if (rows[j] != nullptr) kernels.load_row(rows[j], t.dtype, t.stride[3], head_dim, 1.f, dst);
    std::fill(rows[j] != nullptr ? dst + head_dim : dst, dst + row, 0.f);
  }
}
}  // namespace

int64_t PackedSequence::floats(const TileKernels& kernels, int64_t length, int head_dim, int row, bool backward) {
  const int64_t keys = (length + kernels.panel_keys - 1) / kernels.panel_keys * kernels.panel_keys;
  return keys * (backward ? 2 * head_dim + row : head_dim + row);
}

bool PackedSequence::direct_v(int head_dim, int row) const {
  return !backward && order == nullptr && v.dtype == DType::f32 && v.stride[3] == 1 && head_dim == row;
}

void PackedSequence::allocate(const TileKernels& kernels, int head_dim, int row) {
  const int keys = kernels.panel_keys;
  panels = (length + keys - 1) / keys;
  valid.assign(static_cast<size_t>(panels), 0);
  if (!whole) return;
  const int64_t padded = panels * keys;
  const int64_t need = padded * (backward ? 2 * head_dim + row : head_dim + (direct_v(head_dim, row) ? 0 : row));
  memory.reset(new float[static_cast<size_t>(std::max<int64_t>(need, 1))]);
  const size_t bytes = static_cast<size_t>(need) * sizeof(float);
  if (bytes >= kLargeBytes) prefer_large_pages(memory.get(), bytes);
  float* next = memory.get();
  kv.k_panels = next;
  next += padded * head_dim;
  if (backward) {
    kv.v_panels = next;
    kv.k_rows = next + padded * head_dim;
  } else if (direct_v(head_dim, row)) {
    kv.v_rows = reinterpret_cast<const float*>(row_of(v, batch, 0, head));
    kv.v_stride = v.stride[1];
  } else {
    kv.v_rows = next;
    kv.v_stride = row;
  }
}

PanelRows PackedSequence::rows_of(int64_t panel, int keys) const {
  PanelRows rows;
  rows.valid = 0;
  for (int j = 0; j < keys; ++j) {
    const int64_t position = panel * keys + j;
    const int64_t token = position >= length ? -1 : order != nullptr ? order[position] : position;
    const bool exists = token >= 0 && token < valid_length;
    rows.valid |= exists ? 1u << j : 0u;
    rows.k[j] = exists ? row_of(k, batch, token, head) : nullptr;
    rows.v[j] = exists ? row_of(v, batch, token, head) : nullptr;
  }
  return rows;
}

void PackedSequence::pack(const TileKernels& kernels, int head_dim, int row, int64_t first_panel, int64_t end_panel) {
  const int keys = kernels.panel_keys;
  auto* k_panels = const_cast<float*>(kv.k_panels);
  auto* v_panels = const_cast<float*>(kv.v_panels);
  auto* k_rows = const_cast<float*>(kv.k_rows);
  auto* v_rows = const_cast<float*>(kv.v_rows);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const PanelRows rows = rows_of(panel, keys);
    valid[static_cast<size_t>(panel)] = rows.valid;
    if (!whole) continue;
    const int64_t at = panel * keys * head_dim;
    kernels.pack_panel(rows.k, k.dtype, k.stride[3], head_dim, k_panels + at);
    if (backward) {
      kernels.pack_panel(rows.v, v.dtype, v.stride[3], head_dim, v_panels + at);
      load_rows(kernels, rows.k, k, head_dim, row, k_rows + panel * keys * row);
    } else if (!direct_v(head_dim, row)) {
      load_rows(kernels, rows.v, v, head_dim, row, v_rows + panel * keys * row);
    }
  }
}

void PackedSequence::list_rows(const TileKernels& kernels, int head_dim, const PanelRef* refs, int n,
                               NextRows* rows) const {
  const int keys = kernels.panel_keys;
  rows->count = 2 * n * keys;
  rows->bytes = head_dim * (k.dtype == DType::f32 ? 4 : 2);
  for (int i = 0; i < n; ++i) {
    const PanelRows panel = rows_of(refs[i].panel, keys);
    std::copy_n(panel.k, keys, rows->rows + i * keys);
    std::copy_n(panel.v, keys, rows->rows + (n + i) * keys);
  }
}

KeyValues PackedSequence::pack_stage(const TileKernels& kernels, int head_dim, int row, PanelRef* refs, int n,
                                     float* memory) const {
  const int keys = kernels.panel_keys;
  float *const k_panels = memory, *const v_rows = memory + int64_t{kStageKeys} * head_dim;
  for (int i = 0; i < n; ++i) {
    const PanelRows rows = rows_of(refs[i].panel, keys);
    kernels.pack_panel(rows.k, k.dtype, k.stride[3], head_dim, k_panels + int64_t{i} * keys * head_dim);
    load_rows(kernels, rows.v, v, head_dim, row, v_rows + int64_t{i} * keys * row);
    refs[i].panel = i;
  }
  KeyValues stage{};
  stage.k_panels = k_panels;
  stage.v_rows = v_rows;
  stage.v_stride = row;
  return stage;
}

std::vector<Source> list_sources(const AttentionParams& p, bool backward) {
  const int64_t batch = p.q.size[0], heads = p.q.size[2], kv_heads = p.k.size[2], group = heads / kv_heads;
  const bool per_head = p.plan.kv_order.data != nullptr && p.plan.kv_order.heads > 1;
  std::vector<Source> sources;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < (per_head ? heads : kv_heads); ++s) {
      Source source{b, per_head ? s / group : s, per_head ? s : s * group, per_head ? s + 1 : (s + 1) * group, {}};
      PackedSequence main;
      main.k = p.k;
      main.v = p.v;
      main.batch = b;
      main.head = source.kv_head;
      main.length = p.k.size[1];
      main.order = p.plan.kv_order.row(b, source.head_begin);
      main.valid_length = p.kv_len == nullptr ? main.length : p.kv_len[b];
      main.backward = backward;
      source.sequences.push_back(std::move(main));
      for (const SegmentView& segment : p.segments) {
        PackedSequence extra;
        extra.k = segment.k;
        extra.v = segment.v;
        extra.batch = segment.k.size[0] > 1 ? b : 0;
        extra.head = source.kv_head;
        extra.length = extra.valid_length = segment.k.size[1];
        extra.backward = backward;
        source.sequences.push_back(std::move(extra));
      }
      sources.push_back(std::move(source));
    }
  }
  return sources;
}

size_t sources_in_budget(const AttentionParams& p, const std::vector<Source>& sources, size_t begin) {
  const TileKernels& kernels = tile_kernels();
  const int head_dim = static_cast<int>(p.q.size[3]), row = round_up(head_dim, kernels.panel_keys);
  int64_t used = 0;
  size_t n = 0;
  for (; begin + n < sources.size(); ++n) {
    for (const PackedSequence& s : sources[begin + n].sequences)
      if (s.whole) used += PackedSequence::floats(kernels, s.length, head_dim, row, s.backward);
    if (used > kBudgetFloats && n > 0) break;
  }
  return n;
}

void pack_sources(const AttentionParams& p, std::vector<Source>* sources, size_t begin, size_t end,
                  const ParallelFor& parallel) {
  const TileKernels& kernels = tile_kernels();
  const int head_dim = static_cast<int>(p.q.size[3]), row = round_up(head_dim, kernels.panel_keys);
  struct Task {
    PackedSequence* sequence;
    int64_t first, last;
  };
  std::vector<Task> tasks;
  for (size_t i = begin; i < end; ++i) {
    for (PackedSequence& s : (*sources)[i].sequences) {
      s.allocate(kernels, head_dim, row);
      for (int64_t panel = 0; panel < s.panels; panel += kPanelsPerTask)
        tasks.push_back({&s, panel, std::min(s.panels, panel + kPanelsPerTask)});
    }
  }
  parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    const Task& t = tasks[static_cast<size_t>(i)];
    t.sequence->pack(kernels, head_dim, row, t.first, t.last);
  });
}

}  // namespace vdit

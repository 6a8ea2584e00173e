#include "cpu/attention_pack.h"

#include <algorithm>
#include <cstring>

namespace vdit {

namespace {
constexpr int64_t kBudgetFloats = int64_t{48} << 20;  // 192 MiB of packed keys and values at a time
constexpr int64_t kPanelsPerTask = 64;
}  // namespace

int64_t PackedSequence::floats(const TileKernels& kernels, int64_t length, int head_dim, int row, bool backward) {
  const int64_t keys = (length + kernels.panel_keys - 1) / kernels.panel_keys * kernels.panel_keys;
  return keys * (backward ? 2 * head_dim + row : head_dim + row);
}

void PackedSequence::allocate(const TileKernels& kernels, int head_dim, int row) {
  const int keys = kernels.panel_keys;
  panels = (length + keys - 1) / keys;
  direct_v = !backward && order == nullptr && v.dtype == DType::f32 && v.stride[3] == 1 && head_dim == row;
  const int64_t padded = panels * keys;
  const int64_t need = padded * (backward ? 2 * head_dim + row : head_dim + (direct_v ? 0 : row));
  memory.reset(new float[static_cast<size_t>(std::max<int64_t>(need, 1))]);
  float* next = memory.get();
  kv.k_panels = next;
  next += padded * head_dim;
  if (backward) {
    kv.v_panels = next;
    kv.k_rows = next + padded * head_dim;
  } else if (direct_v) {
    kv.v_rows = reinterpret_cast<const float*>(row_of(v, batch, 0, head));
    kv.v_stride = v.stride[1];
  } else {
    kv.v_rows = next;
    kv.v_stride = row;
  }
  valid.assign(static_cast<size_t>(panels), 0);
}

void PackedSequence::pack(const TileKernels& kernels, int head_dim, int row, int64_t first_panel, int64_t end_panel) {
  const int keys = kernels.panel_keys;
  std::vector<float> k_tmp(static_cast<size_t>(keys) * row), v_tmp(backward ? k_tmp.size() : 0);
  auto* k_panels = const_cast<float*>(kv.k_panels);
  auto* v_panels = const_cast<float*>(kv.v_panels);
  auto* k_rows = const_cast<float*>(kv.k_rows);
  auto* v_rows = const_cast<float*>(kv.v_rows);
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    uint32_t bits = 0;
    for (int j = 0; j < keys; ++j) {
      const int64_t position = panel * keys + j;
      const int64_t token = position >= length ? -1 : order != nullptr ? order[position] : position;
      const bool exists = token >= 0 && token < valid_length;
      bits |= exists ? 1u << j : 0u;
      // Keys that do not exist are written as zeros, so that whatever lies there cannot reach a product.
      auto load = [&](const View4& t, float* dst, int pad_to) {
        if (exists)
          kernels.load_row(row_of(t, batch, token, head), t.dtype, t.stride[3], head_dim, 1.f, dst);
        else
          std::memset(dst, 0, sizeof(float) * static_cast<size_t>(head_dim));
        std::fill(dst + head_dim, dst + pad_to, 0.f);
      };
      float* k_row = backward ? k_rows + position * row : k_tmp.data() + static_cast<int64_t>(j) * row;
      load(k, k_row, row);
      if (backward)
        load(v, v_tmp.data() + static_cast<int64_t>(j) * row, row);
      else if (!direct_v)
        load(v, v_rows + position * row, row);
    }
    valid[static_cast<size_t>(panel)] = bits;
    const int64_t at = panel * keys * head_dim;
    kernels.transpose_panel(backward ? k_rows + panel * keys * row : k_tmp.data(), row, head_dim, k_panels + at);
    if (backward) kernels.transpose_panel(v_tmp.data(), row, head_dim, v_panels + at);
  }
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
      used += PackedSequence::floats(kernels, s.length, head_dim, row, s.backward);
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

// Host entry of forward attention. Compiled by nvcc for the package and by the host compiler for the emulator.
#include "kernels/attention/forward.h"

#include "kernels/attention/combine.h"
#include "kernels/attention/problem.h"
#include "kernels/attention/schedule.h"

namespace vdit::gpu {
namespace {

constexpr int kSharedBytes = 99 * 1024;  // what the smallest of the supported GPUs allows; the portable kernel fits in

// What an item costs besides its stages, and a part of one: fp32 results that are written and read again. In stages, by
// bytes and FLOP (docs/kernels/kv_cache.md).
constexpr int64_t kItemStages = 1, kPartStages = 4;

// Parts for the fewest stages in all rounds of CTAs; 1 unless they save a tenth.
int64_t fewest_rounds(int64_t items, int64_t stages, int64_t resident, int64_t most) {
  int64_t best = 1, least = ceil_div(items, resident) * (stages + kItemStages) * 9 / 10;
  for (int64_t parts = 2; parts <= most; ++parts) {
    const int64_t cost = ceil_div(items * parts, resident) * (ceil_div(stages, parts) + kPartStages);
    if (cost < least) {
      best = parts;
      least = cost;
    }
  }
  return best;
}

// Everything that follows from shapes: the numbers of Work, and where its buffers lie in the workspace.
struct Layout {
  Variant variant;
  Work work{};
  int64_t part_rows = 0;
  size_t items_at = 0, out_at = 0, lse_at = 0, bytes = 0;
};

Layout layout(const AttentionParams& p, const ForwardOptions& options) {
  Layout l;
  l.variant = attention_forward_variant(p, options);
  const Tile tile = l.variant == Variant::sm90a ? forward_tile_sm90a(p) : forward_tile_sm80(p);
  Work& w = l.work;
  w.rows = tile.rows;
  if (tile.rows <= 0) return l;  // the variant has no kernel for this head dim
  int64_t capacity, replicas = 1;
  if (p.plan.tiles == nullptr) {
    capacity = ceil_div(p.lq, w.rows) * p.batch * p.heads;
  } else {
    // Tiles of n1, n2, ... rows are at most sum((n - 1) / rows + 1) items.
    const int64_t rows = int64_t(p.plan.batch) * p.plan.heads * p.lq;
    const int64_t tiles = p.plan.num_tiles < rows ? p.plan.num_tiles : rows;
    capacity = tiles + (rows - tiles) / w.rows;
    replicas = int64_t(p.batch / p.plan.batch) * (p.heads / p.plan.heads);
    l.items_at = kHeaderBytes;
    l.bytes = ceil_div(l.items_at + capacity * 8, 16) * 16;
  }
  w.splits = options.splits;
  if (w.splits <= 0) {
    // Split only when the items alone leave processors idle, into parts of at least 4 stages. Items of one plan for all
    // heads are alike: the last round of CTAs may be split as well. Others balance themselves: one round.
    const int64_t resident = int64_t(options.sm_count) * (l.variant == Variant::sm90a ? 1 : 2);
    const int64_t items = capacity * replicas > 0 ? capacity * replicas : 1;
    const int64_t stages = ceil_div(key_count(p), tile.keys), limit = stages / 4 < kMaxSplits ? stages / 4 : kMaxSplits;
    const bool alike = p.plan.tiles == nullptr || (p.plan.batch == 1 && p.plan.heads == 1);
    const int64_t fit = resident / items < limit ? resident / items : limit;
    w.splits = int32_t(alike ? fewest_rounds(items, stages, resident, limit) : fit);
  }
  w.splits = w.splits < 1 ? 1 : w.splits > kMaxSplits ? kMaxSplits : w.splits;
  w.capacity = int32_t(capacity);
  w.replicas = int32_t(replicas);
  if (capacity * replicas * w.splits > INT32_MAX) {
    w.splits = 1;
    if (capacity * replicas > INT32_MAX) w.capacity = -1;  // more CTAs than a grid has
  }
  if (w.splits > 1) {
    l.part_rows = capacity * replicas * w.splits * w.rows;
    l.out_at = l.bytes;
    l.lse_at = l.out_at + size_t(l.part_rows) * p.dim * 4;
    l.bytes = l.lse_at + size_t(ceil_div(l.part_rows, 4)) * 16;
  }
  return l;
}

int launch_kernel(Variant variant, const ForwardArgs& args, void* stream) {
  if (int64_t(args.work.capacity) * args.work.replicas == 0) return 0;
  return variant == Variant::sm90a ? launch_forward_sm90a(args, stream) : launch_forward_sm80(args, stream);
}

// Rows that no tile covers read the segments alone, and nothing where there are none. Does nothing on the device if the
// tiles cover every row.
int fill(const Layout& l, const ForwardArgs& args, void* stream) {
  const AttentionParams& p = args.params;
  if (p.num_segments > 0) {
    ForwardArgs only = args;
    only.params.lk = 0;
    only.params.kv_len = nullptr;
    only.params.plan = Plan{};
    only.work = Work{nullptr, args.work.header, 0, 1, args.work.rows, 1, nullptr, nullptr, 1};
    const int64_t items = ceil_div(p.lq, args.work.rows) * p.batch * p.heads;
    if (items > INT32_MAX) return kInvalid;
    only.work.capacity = int32_t(items);
    return launch_kernel(l.variant, only, stream);
  }
  const int64_t rows = int64_t(p.batch) * p.heads * p.lq, chunks = rows * p.dim / 8;
  const int64_t blocks = ceil_div(chunks, kFillThreads);
  return arch::launch(fill_empty, dim3(unsigned(blocks < 2048 ? blocks : 2048)), dim3(kFillThreads), 0,
                      static_cast<arch::stream_t>(stream), args.outputs.out, chunks, args.outputs.lse, rows,
                      args.work.header);
}

}  // namespace

Variant attention_forward_variant(const AttentionParams& params, const ForwardOptions& options) {
  if (options.variant != Variant::automatic) return options.variant;
  if (options.compute_capability == 90 && forward_tile_sm90a(params).rows > 0) return Variant::sm90a;
  return Variant::sm80;
}

size_t attention_workspace_bytes(const AttentionParams& params, const ForwardOptions& options) {
  return layout(params, options).bytes;
}

int attention_forward(const AttentionParams& params, const AttentionOutputs& outputs, void* workspace, size_t bytes,
                      void* stream, const ForwardOptions& options) {
  if (int64_t(params.batch) * params.heads * params.lq == 0) return 0;
  if (!valid_problem(params) || options.max_shared_bytes < kSharedBytes) return kInvalid;
  const Layout l = layout(params, options);
  if (bytes < l.bytes || l.work.rows <= 0 || l.work.capacity < 0) return kInvalid;
  char* at = static_cast<char*>(workspace);
  const auto s = static_cast<arch::stream_t>(stream);

  ForwardArgs args{params, outputs, l.work};
  if (l.work.splits > 1) {
    args.work.part_out = reinterpret_cast<float*>(at + l.out_at);
    args.work.part_lse = reinterpret_cast<float*>(at + l.lse_at);
  }
  if (params.plan.tiles != nullptr) {
    auto* header = reinterpret_cast<int32_t*>(at);
    auto* items = reinterpret_cast<int32_t*>(at + l.items_at);
    args.work.header = header;
    args.work.items = items;
    if (const int error = arch::launch(schedule, dim3(1), dim3(kScheduleThreads), 0, s, params.plan, params.lq,
                                       l.work.rows, l.work.capacity, items, header))
      return error;
    if (const int error = fill(l, args, stream)) return error;
  }
  if (const int error = launch_kernel(l.variant, args, stream)) return error;
  if (l.work.splits == 1 || l.work.capacity == 0) return 0;
  const auto kernel = params.dtype == DType::bf16 ? combine<arch::BF16> : combine<arch::F16>;
  return arch::launch(kernel, dim3(unsigned(l.work.capacity * l.work.replicas)), dim3(kCombineThreads), 0, s, args);
}

}  // namespace vdit::gpu

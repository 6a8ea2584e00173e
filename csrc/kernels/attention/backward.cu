// Host entry of the gradients of attention. Compiled by nvcc for the package and by the host compiler for the emulator.
#include "kernels/attention/backward.h"

#include "kernels/attention/backward_prepare.h"
#include "kernels/attention/problem.h"

namespace vdit::gpu {
namespace {

constexpr int kItemRows = 64;

// Everything that follows from shapes: the numbers of Work, and where the buffers lie in the workspace.
struct Layout {
  Work work{};
  int64_t parts = 0;  // elements of part_dk; 0: not needed
  size_t header_at = 0, items_at = 0, by_head_at = 0, head_ptr_at = 0, dk_at = 0, dv_at = 0, bytes = 0;
};

Layout layout(const AttentionParams& p) {
  Layout l;
  auto place = [&](int64_t bytes) {
    const size_t at = l.bytes;
    l.bytes += size_t(ceil_div(bytes, 16) * 16);
    return at;
  };
  place(int64_t(p.batch) * p.heads * p.lq * int64_t(sizeof(RowRecord)));  // at 0
  int64_t capacity = ceil_div(p.lq, kItemRows) * p.batch * p.heads, replicas = 1;
  const Plan& plan = p.plan;
  if (plan.tiles != nullptr) {
    capacity = plan.num_tiles + ceil_div(int64_t(plan.batch) * plan.heads * p.lq, kItemRows);
    replicas = int64_t(p.batch / plan.batch) * (p.heads / plan.heads);
    l.header_at = place(kHeaderBytes);
    l.items_at = place(capacity * 8);
    l.by_head_at = place(int64_t(plan.num_tiles) * 4);
    l.head_ptr_at = place((int64_t(plan.batch) * plan.heads + 1) * 4);
    if (p.heads > p.kv_heads && plan.kv_order.data != nullptr && plan.kv_order.heads > 1) {
      l.parts = int64_t(p.batch) * p.heads * p.lk * p.dim;
      l.dk_at = place(l.parts * 4);
      l.dv_at = place(l.parts * 4);
    }
  }
  const bool fits = capacity * replicas <= INT32_MAX;
  l.work = Work{nullptr, nullptr, fits ? int32_t(capacity) : -1, int32_t(replicas), kItemRows, 1, nullptr, nullptr, 0};
  return l;
}

bool valid(const BackwardParams& in, const BackwardOutputs& out) {
  const AttentionParams& p = in.forward;
  if (!valid_problem(p) || p.dim > kMaxBackwardDim) return false;
  for (int i = 0; i < p.num_segments; ++i)
    if (out.segment_batch[i] != 1 && out.segment_batch[i] != p.batch) return false;
  return rows_aligned(in.dout, p.batch, p.lq, p.heads) && rows_aligned(in.out, p.batch, p.lq, p.heads);
}

int launch_dq(const BackwardArgs& args, void* stream) {
  if (int64_t(args.work.capacity) * args.work.replicas == 0) return 0;
  if (args.params.dim <= 64) return backward::launch_dq_64(args, stream);
  if (args.params.dim <= 96) return backward::launch_dq_96(args, stream);
  return backward::launch_dq_128(args, stream);
}

int launch_dkv(const BackwardArgs& args, void* stream) {
  if (backward::dkv_blocks(args) == 0) return 0;
  if (args.params.dim <= 64) return backward::launch_dkv_64(args, stream);
  if (args.params.dim <= 96) return backward::launch_dkv_96(args, stream);
  return backward::launch_dkv_128(args, stream);
}

// dq of rows that no tile covers: from the segments, or 0. Does nothing on the device if the tiles cover every row.
int fill(const BackwardArgs& args, void* stream) {
  const AttentionParams& p = args.params;
  const int64_t rows = int64_t(p.batch) * p.heads * p.lq;
  if (p.num_segments > 0) {
    BackwardArgs only = args;
    only.params.lk = 0;
    only.params.kv_len = nullptr;
    only.params.plan = Plan{};
    const int64_t items = ceil_div(p.lq, kItemRows) * p.batch * p.heads;
    if (items > INT32_MAX) return kInvalid;
    only.work = Work{nullptr, args.work.header, int32_t(items), 1, kItemRows, 1, nullptr, nullptr, 1};
    return launch_dq(only, stream);
  }
  const int64_t chunks = rows * p.dim / 8, blocks = ceil_div(chunks, kFillThreads);
  return arch::launch(fill_empty, dim3(unsigned(blocks < 2048 ? blocks : 2048)), dim3(kFillThreads), 0,
                      static_cast<arch::stream_t>(stream), args.grads.dq, chunks, static_cast<float*>(nullptr),
                      int64_t(0), args.work.header);
}

template <class T>
int records(const BackwardParams& in, RowRecord* to, arch::stream_t stream) {
  const AttentionParams& p = in.forward;
  const int64_t rows = int64_t(p.batch) * p.heads * p.lq;
  const int64_t blocks = ceil_div(rows, backward::kRecordThreads / backward::kRecordLanes);
  if (blocks > INT32_MAX) return kInvalid;
  return arch::launch(backward::row_records<T>, dim3(unsigned(blocks)), dim3(backward::kRecordThreads), 0, stream,
                      backward::RecordArgs{in, to});
}

template <class T>
int sum_parts(const BackwardArgs& args, arch::stream_t stream) {
  const AttentionParams& p = args.params;
  const int64_t blocks = ceil_div(int64_t(p.batch) * p.lk * p.kv_heads * p.dim / 8, backward::kSumThreads);
  if (blocks == 0) return 0;
  return arch::launch(backward::sum_parts<T>, dim3(unsigned(blocks < 4096 ? blocks : 4096)),
                      dim3(backward::kSumThreads), 0, stream, args);
}

template <class T>
int run(const BackwardParams& in, BackwardArgs args, const Layout& l, arch::stream_t stream) {
  const AttentionParams& p = args.params;
  const Plan& plan = p.plan;
  if (int64_t(p.batch) * p.heads * p.lq > 0) {
    if (const int error = records<T>(in, args.records, stream)) return error;
    if (plan.tiles != nullptr) {
      if (const int error = arch::launch(schedule, dim3(1), dim3(kScheduleThreads), 0, stream, plan, p.lq, kItemRows,
                                         args.work.capacity, const_cast<int32_t*>(args.work.items),
                                         const_cast<int32_t*>(args.work.header)))
        return error;
      if (const int error = fill(args, stream)) return error;
    }
    if (const int error = launch_dq(args, stream)) return error;
  }
  if (plan.tiles != nullptr) {
    if (const int error = arch::launch(backward::tiles_by_head, dim3(unsigned(plan.batch * plan.heads)),
                                       dim3(kScheduleThreads), 0, stream, plan, p.lq, args.by_head, args.head_ptr))
      return error;
  }
  if (const int error = launch_dkv(args, stream)) return error;
  return l.parts > 0 ? sum_parts<T>(args, stream) : 0;
}

}  // namespace

int64_t backward::dkv_blocks(const BackwardArgs& args) {
  const AttentionParams& p = args.params;
  int64_t blocks = ceil_div(p.lk, kBlockKeys) * p.batch * (p.heads / args.heads_per_block);
  for (int i = 0; i < p.num_segments; ++i)
    blocks += ceil_div(p.segment[i].length, kBlockKeys) * args.grads.segment_batch[i] * p.kv_heads;
  return blocks <= INT32_MAX ? blocks : -1;
}

size_t attention_backward_workspace_bytes(const BackwardParams& params) { return layout(params.forward).bytes; }

int attention_backward(const BackwardParams& params, const BackwardOutputs& outputs, void* workspace, size_t bytes,
                       void* stream) {
  const AttentionParams& p = params.forward;
  if (!valid(params, outputs)) return kInvalid;
  const Layout l = layout(p);
  if (bytes < l.bytes || l.work.capacity < 0) return kInvalid;
  char* at = static_cast<char*>(workspace);

  BackwardArgs args{};
  args.params = p;
  args.dout = params.dout;
  args.grads = outputs;
  args.records = reinterpret_cast<RowRecord*>(at);
  args.work = l.work;
  args.heads_per_block = l.parts > 0 ? 1 : p.heads / p.kv_heads;
  if (p.plan.tiles != nullptr) {
    args.work.header = reinterpret_cast<int32_t*>(at + l.header_at);
    args.work.items = reinterpret_cast<int32_t*>(at + l.items_at);
    args.by_head = reinterpret_cast<int32_t*>(at + l.by_head_at);
    args.head_ptr = reinterpret_cast<int32_t*>(at + l.head_ptr_at);
  }
  if (l.parts > 0) {
    args.part_dk = reinterpret_cast<float*>(at + l.dk_at);
    args.part_dv = reinterpret_cast<float*>(at + l.dv_at);
  }
  args.scale_log2 = p.scale == 0.f ? 1e-30f : fabsf(p.scale) * backward::kLog2e;  // products times 1e-30: as good as 0
  args.sign = p.scale < 0.f ? 0x80008000u : 0u;
  if (backward::dkv_blocks(args) < 0) return kInvalid;
  const auto s = static_cast<arch::stream_t>(stream);
  return p.dtype == DType::bf16 ? run<arch::BF16>(params, args, l, s) : run<arch::F16>(params, args, l, s);
}

}  // namespace vdit::gpu

// The clustering operators and block means, through the host entries that the CUDA operators call.
#include "emulator/harness.h"
#include "kernels/select/block_mean.h"
#include "kernels/select/counting_sort.h"
#include "kernels/select/kmeans.h"
#include "kernels/select/permute.h"

using namespace vdit;

namespace {

TokenRows guarded(emu::Harness& h, const char* name, const TokenRows& rows, const std::vector<int64_t>& sizes,
                  size_t elem) {
  TokenRows copy = rows;
  const bool aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  copy.data = h.input_strided(name, rows.data, elem, sizes, {rows.batch_stride, rows.row_stride, rows.head_stride, 1},
                              aligned ? 16 : elem);
  return copy;
}

TokenInts guarded(emu::Harness& h, const char* name, const TokenInts& ints, int64_t batch, int64_t heads, int64_t n) {
  TokenInts copy = ints;
  copy.data = h.input_strided(name, ints.data, size_t(ints.bytes), {batch, heads, n, 1},
                              {ints.batch_stride, ints.head_stride, ints.stride, 1}, size_t(ints.bytes));
  return copy;
}

size_t element_bytes(DType type) { return type == DType::f32 ? 4 : 2; }

}  // namespace

VDIT_EMU_EXPORT size_t vdit_emu_kmeans_params_bytes() { return sizeof(KmeansParams); }
VDIT_EMU_EXPORT size_t vdit_emu_counting_sort_params_bytes() { return sizeof(CountingSortParams); }
VDIT_EMU_EXPORT size_t vdit_emu_block_mean_params_bytes() { return sizeof(BlockMeanParams); }
VDIT_EMU_EXPORT size_t vdit_emu_permute_params_bytes() { return sizeof(PermuteParams); }

VDIT_EMU_EXPORT int vdit_emu_kmeans(const KmeansParams* params, const emu::Policy* policy, char* error,
                                    size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    KmeansParams p = *params;
    p.x = guarded(h, "x", p.x, {p.batch, p.tokens, p.heads, p.dim}, element_bytes(p.dtype));
    p.centre = guarded(h, "centroids", p.centre, {p.batch, p.centres, p.heads, p.dim}, 4);
    p.labels = h.output("labels", p.labels, size_t(p.batch) * p.heads * p.tokens);
    const size_t bytes = kmeans_workspace_bytes(p);
    const int code = cuda_kmeans_assign(p, h.scratch("workspace", bytes), bytes, nullptr);
    h.finish();
    return code;
  });
}

VDIT_EMU_EXPORT int vdit_emu_counting_sort(const CountingSortParams* params, const emu::Policy* policy, char* error,
                                           size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    CountingSortParams p = *params;
    const size_t sequences = size_t(p.batch) * p.heads;
    p.labels = guarded(h, "labels", p.labels, p.batch, p.heads, p.tokens);
    p.order = h.output("order", p.order, sequences * p.tokens);
    p.counts = h.output("counts", p.counts, sequences * p.classes);
    const size_t bytes = counting_sort_workspace_bytes(p);
    const int code = cuda_counting_sort(p, h.scratch("workspace", bytes), bytes, nullptr);
    h.finish();
    return code;
  });
}

VDIT_EMU_EXPORT int vdit_emu_block_mean(const BlockMeanParams* params, const emu::Policy* policy, char* error,
                                        size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    BlockMeanParams p = *params;
    const size_t means = size_t(p.batch) * p.heads * p.blocks;
    p.x = guarded(h, "x", p.x, {p.batch, p.tokens, p.heads, p.dim}, element_bytes(p.dtype));
    p.lengths = guarded(h, "lengths", p.lengths, p.lengths_batch, p.lengths_heads, p.blocks);
    p.order = guarded(h, "order", p.order, p.batch, p.heads, p.tokens);
    p.kv_len = guarded(h, "kv_len", p.kv_len, p.batch, 1, 1);
    p.means = h.output("means", p.means, means * p.dim);
    p.counts = h.output("counts", p.counts, means);
    const size_t bytes = block_mean_workspace_bytes(p);
    const int code = cuda_block_mean(p, h.scratch("workspace", bytes), bytes, nullptr);
    h.finish();
    return code;
  });
}

VDIT_EMU_EXPORT int vdit_emu_permute(const PermuteParams* params, const emu::Policy* policy, char* error,
                                     size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    PermuteParams p = *params;
    p.x = guarded(h, "x", p.x, {p.batch, p.tokens, p.heads, p.dim}, size_t(p.element_bytes));
    p.order = guarded(h, "order", p.order, p.batch, p.heads, p.tokens);
    p.out = h.output_bytes("out", p.out, size_t(p.batch) * p.tokens * p.heads * p.dim * p.element_bytes);
    const int code = cuda_permute_tokens(p, nullptr);
    h.finish();
    return code;
  });
}

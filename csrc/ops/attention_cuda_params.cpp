#include "ops/attention_cuda_params.h"

#include <limits>

#ifdef VDIT_CUDA
#include "kernels/runtime.h"

namespace vdit {
namespace {

std::string strides_text(const Tensor& t) {
  std::string text = "[";
  for (int i = 0; i < 4; ++i) text += (i ? ", " : "") + std::to_string(t.stride(i));
  return text + "]";
}

gpu::Order order_of(const Optional& t, const char* name, const Tensor& q, int64_t n) {
  if (!t) return {nullptr, 1, 1};
  check_order(*t, name, q);
  const int64_t batch = q.size(0), heads = q.size(2);
  VDIT_CHECK(t->size(2) == n && (t->size(0) == 1 || t->size(0) == batch) && (t->size(1) == 1 || t->size(1) == heads),
             "attention: plan.", name, " has shape ", shape_text(*t), ", expected [1 or ", batch, ", 1 or ", heads,
             ", ", n, "]");
  return {t->const_data_ptr<int32_t>(), int32_t(t->size(0)), int32_t(t->size(1))};
}

int32_t count(int64_t n, const char* what) {
  VDIT_CHECK(n <= std::numeric_limits<int32_t>::max(), "attention: ", n, " ", what, "; at most ",
             std::numeric_limits<int32_t>::max());
  return int32_t(n);
}

gpu::Plan plan_of(const Tensor& q, const Tensor& k, const Tensor& tiles, const Tensor& run_ptr, const Tensor& runs,
                  const Optional& mask_bits, const Optional& q_order, const Optional& kv_order, int64_t plan_batch,
                  int64_t plan_heads) {
  VDIT_CHECK(plan_batch >= 1 && plan_heads >= 1 && (plan_batch == 1 || plan_batch == q.size(0)) &&
                 (plan_heads == 1 || plan_heads == q.size(2)),
             "attention: plan was made for batch ", plan_batch, " and ", plan_heads,
             " heads, but the tensors have batch ", q.size(0), " and ", q.size(2), " heads (1 broadcasts)");
  gpu::Plan plan{};
  plan.run_ptr = run_ptr.const_data_ptr<int32_t>();
  plan.num_tiles = count(tiles.size(0), "plan tiles");
  plan.num_runs = count(runs.size(0), "plan runs");
  // A plan without tiles is a plan: it reads nothing. An empty tensor may have no address.
  plan.tiles = plan.num_tiles > 0 ? tiles.const_data_ptr<int32_t>() : plan.run_ptr;
  plan.runs = runs.const_data_ptr<int32_t>();
  if (mask_bits) {
    plan.mask_bits = mask_bits->const_data_ptr<int32_t>();
    plan.num_mask_words = mask_bits->size(0);
  }
  plan.batch = int32_t(plan_batch);
  plan.heads = int32_t(plan_heads);
  plan.q_order = order_of(q_order, "q_order", q, q.size(1));
  plan.kv_order = order_of(kv_order, "kv_order", q, k.size(1));
  return plan;
}

void set_segments(gpu::AttentionParams& p, const Tensors& segment_k, const Tensors& segment_v, const Tensor& q,
                  const Tensor& k) {
  check_segments(segment_k, segment_v, q, k);
  VDIT_CHECK(segment_k.size() <= gpu::kMaxSegments, "attention: ", segment_k.size(), " segments; at most ",
             gpu::kMaxSegments, " on CUDA, concatenate some");
  int64_t keys = k.size(1);
  for (size_t i = 0; i < segment_k.size(); ++i) {
    const std::string name = "segments[" + std::to_string(i) + "]";
    gpu::Segment& s = p.segment[i];
    s.k = rows_of(segment_k[i], name + ".k");
    s.v = rows_of(segment_v[i], name + ".v");
    if (segment_k[i].size(0) == 1) s.k.batch_stride = s.v.batch_stride = 0;
    s.length = int32_t(segment_k[i].size(1));
    keys += segment_k[i].size(1);
  }
  const int64_t limit = std::numeric_limits<int32_t>::max() / 2;
  VDIT_CHECK(keys <= limit, "attention: ", keys, " keys with the segments; at most ", limit);
  p.num_segments = int32_t(segment_k.size());
}

}  // namespace

bool has_aligned_rows(const Tensor& t) {
  bool aligned = t.size(3) == 1 || t.stride(3) == 1;
  for (int i = 0; i < 3; ++i) aligned = aligned && (t.size(i) <= 1 || (t.stride(i) % 8 == 0 && t.stride(i) >= 0));
  return aligned && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

gpu::Rows rows_of(const Tensor& t, const std::string& name, const char* op) {
  VDIT_CHECK(has_aligned_rows(t), op, ": ", name, " has strides ", strides_text(t),
             "; on CUDA the last dimension must be contiguous, and every row must begin at a multiple of 16 bytes "
             "(strides a multiple of 8); pass ",
             name, ".contiguous()");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

gpu::ForwardOptions options_for(int32_t device, const char* op) {
  DeviceLimits info{};
  check_cuda(cuda_device_limits(device, &info), op);
  VDIT_CHECK(info.compute_capability >= 80, op, ": the GPU cuda:", device, " has compute capability ",
             info.compute_capability / 10, ".", info.compute_capability % 10,
             "; the kernels need 8.0 or newer; move the tensors to the CPU, or call vdit_fast.reference.", op);
  gpu::ForwardOptions options;
  options.compute_capability = info.compute_capability;
  options.sm_count = info.processors;
  options.max_shared_bytes = info.shared_bytes;
  return options;
}

gpu::AttentionParams cuda_params(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& tiles,
                                 const Optional& run_ptr, const Optional& runs, const Optional& mask_bits,
                                 const Optional& q_order, const Optional& kv_order, int64_t plan_batch,
                                 int64_t plan_heads, double scale, const Optional& row_scale, const Optional& kv_len,
                                 const Tensors& segment_k, const Tensors& segment_v) {
  check_qkv(q, k, v);
  VDIT_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half, "attention: q is ",
             dtype_text(q.scalar_type()),
             "; the CUDA kernels take bfloat16 and float16: convert q, k and v, or call "
             "vdit_fast.reference.attention");
  VDIT_CHECK(q.size(3) % 8 == 0, "attention: head dim is ", q.size(3),
             "; on CUDA it must be a multiple of 8: pad q, k and v with zeros and keep the scale, or ", kElsewhere);
  gpu::AttentionParams p{};
  p.q = rows_of(q, "q");
  p.k = rows_of(k, "k");
  p.v = rows_of(v, "v");
  p.batch = count(q.size(0), "batch items");
  p.heads = count(q.size(2), "heads");
  p.kv_heads = int32_t(k.size(2));
  p.dim = int32_t(q.size(3));
  p.lq = int32_t(q.size(1));
  p.lk = int32_t(k.size(1));
  p.dtype = kernel_dtype(q, "attention: q");
  p.scale = checked_scale(scale);
  const bool given = check_plan_lists(q, tiles, run_ptr, runs, mask_bits, q_order, kv_order);
  if (given && tiles && run_ptr && runs) {
    p.plan = plan_of(q, k, *tiles, *run_ptr, *runs, mask_bits, q_order, kv_order, plan_batch, plan_heads);
  } else {
    p.plan.batch = p.plan.heads = 1;
  }
  if (row_scale) {
    check_rows(*row_scale, "row_scale", q);
    p.row_scale = row_scale->const_data_ptr<float>();
  }
  if (kv_len) {
    p.kv_len_bytes = check_kv_len(*kv_len, q) ? 8 : 4;
    p.kv_len = kv_len->const_data_ptr();
  }
  set_segments(p, segment_k, segment_v, q, k);
  return p;
}

}  // namespace vdit
#endif

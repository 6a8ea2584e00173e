#include "cpu/short_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

#include "ops/common.h"

namespace vdit {
namespace {

using Optional = std::optional<Tensor>;

ShortView view_of(const Tensor& t, const void* data) {
  ShortView view{data, {}};
  for (int i = 0; i < 5; ++i) view.stride[i] = t.stride(i);
  return view;
}

void check_like_q(const Tensor& t, const char* name, const Tensor& q, const Tensor& k) {
  VDIT_CHECK(t.scalar_type() == q.scalar_type(), "short_attention: ", name, " is ", dtype_text(t.scalar_type()),
             " but q is ", dtype_text(q.scalar_type()), "; convert them to one dtype");
  VDIT_CHECK(same_device(t, q), "short_attention: ", name, " is on ", device_text(t), " but q is on ", device_text(q),
             "; move them to one device");
  VDIT_CHECK(t.dim() == 5 && t.size(0) == q.size(0) && t.size(1) == k.size(1) && t.size(2) == q.size(2) &&
                 t.size(3) == q.size(3) && t.size(4) == q.size(4),
             "short_attention: ", name, " has shape ", shape_text(t), "; expected [", q.size(0), ", ",
             k.dim() == 5 ? std::to_string(k.size(1)) : "keys", ", ", q.size(2), ", ", q.size(3), ", ", q.size(4),
             "] to go with q");
}

// Checks everything, allocates the result and points the parameters at it.
ShortAttentionParams prepare(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal,
                             const Optional& kv_len, Tensor& out) {
  ShortAttentionParams p{};
  p.dtype = kernel_dtype(q, "short_attention: q");
  VDIT_CHECK(q.dim() == 5, "short_attention: q has shape ", shape_text(q),
             "; expected [batch, rows, places, heads, dim]; unsqueeze(2) adds one place");
  check_like_q(k, "k", q, k);
  check_like_q(v, "v", q, k);
  VDIT_CHECK(k.size(1) <= kShortMaxKeys, "short_attention: k has ", k.size(1), " keys; at most ", kShortMaxKeys,
             ", use vdit_fast.attention for longer sequences");
  VDIT_CHECK(q.size(4) >= 1 && q.size(4) <= kShortMaxDim, "short_attention: head dimension ", q.size(4),
             "; expected 1 to ", kShortMaxDim);
  VDIT_CHECK(q.size(1) <= INT32_MAX - kShortMaxKeys && q.size(3) <= INT32_MAX, "short_attention: q has shape ",
             shape_text(q), "; rows and heads must fit 32 bits");
  const int64_t items = q.size(0) * q.size(2) * q.size(3) * ((q.size(1) + 63) / 64);
  VDIT_CHECK(items <= INT32_MAX, "short_attention: q has shape ", shape_text(q), ", which is ", items,
             " sequences of up to 64 rows; at most ", INT32_MAX, " at once, split it along the places");
  VDIT_CHECK(std::isfinite(float(scale)), "short_attention: scale is ", scale, "; expected a finite number");
  if (kv_len) {
    const ScalarType type = kv_len->scalar_type();
    VDIT_CHECK(type == ScalarType::Int || type == ScalarType::Long, "short_attention: kv_len is ", dtype_text(type),
               "; expected int32 or int64");
    VDIT_CHECK(kv_len->dim() == 1 && kv_len->size(0) == q.size(0), "short_attention: kv_len has shape ",
               shape_text(*kv_len), "; expected [batch] = [", q.size(0), "]");
    VDIT_CHECK(same_device(*kv_len, q), "short_attention: kv_len is on ", device_text(*kv_len), " but q is on ",
               device_text(q), "; move them to one device");
    p.kv_len = kv_len->const_data_ptr();
    p.kv_len_stride = kv_len->stride(0);
    p.kv_len_bytes = type == ScalarType::Long ? 8 : 4;
  }
  p.batch = q.size(0);
  p.places = q.size(2);
  p.heads = int32_t(q.size(3));
  p.lq = int32_t(q.size(1));
  p.lk = int32_t(k.size(1));
  p.dim = int32_t(q.size(4));
  p.causal = causal ? 1 : 0;
  p.scale = float(scale);
  out = torch::stable::empty_like(q);
  p.q = view_of(q, q.const_data_ptr());
  p.k = view_of(k, k.const_data_ptr());
  p.v = view_of(v, v.const_data_ptr());
  p.out = view_of(out, out.mutable_data_ptr());
  return p;
}

Tensor short_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal,
                           const Optional& kv_len) {
  Tensor out;
  const ShortAttentionParams p = prepare(q, k, v, scale, causal, kv_len, out);
  if (out.numel() == 0) return out;
  constexpr int64_t kProductsPerTask = 1 << 18;
  const int64_t products = int64_t(2) * p.lq * std::max(p.lk, 1) * p.dim;
  const int64_t grain = std::max<int64_t>(1, kProductsPerTask / products);
  torch::stable::parallel_for(0, p.batch * p.places * p.heads, grain, [&p](int64_t first, int64_t last) {
    const std::unique_ptr<float[]> scratch(new float[size_t(cpu_short_attention_scratch(p))]);
    cpu_short_attention(p, first, last, scratch.get());
  });
  return out;
}

#ifdef VDIT_CUDA
Tensor short_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, double scale, bool causal,
                            const Optional& kv_len) {
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out;
  const ShortAttentionParams p = prepare(q, k, v, scale, causal, kv_len, out);
  if (out.numel() == 0) return out;
  check_cuda(cuda_short_attention(p, current_cuda_stream(device)), "short_attention");
  return out;
}
#else
Tensor short_attention_cuda(const Tensor&, const Tensor&, const Tensor&, double, bool, const Optional&) {
  fail_without_cuda("short_attention");
}
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) { m.impl("short_attention", TORCH_BOX(&vdit::short_attention_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("short_attention", TORCH_BOX(&vdit::short_attention_cuda)); }

#include "cpu/linear_attention.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "ops/cpu_call.h"
#include "ops/token_args.h"
#ifdef VDIT_CUDA
#include "kernels/runtime.h"
#endif

namespace vdit {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kMaxTokens = int64_t{1} << 30;

FeatureMap feature_map(int64_t code, const std::string& op) {
  VDIT_CHECK(code >= 0 && code <= 3, op, ": feature_map is ", code,
             "; expected 0 (hedgehog), 1 (relu), 2 (elu) or 3 (identity)");
  return static_cast<FeatureMap>(code);
}

TokenRows tokens(const Tensor& x, const std::string& what, int64_t most_dim) {
  const TokenRows rows = token_rows(x, what);
  VDIT_CHECK(x.size(3) >= 1 && x.size(3) <= most_dim, what, " has dim ", x.size(3), "; supported are 1 to ", most_dim);
  VDIT_CHECK(x.size(2) >= 1, what, " has shape ", shape_text(x), "; expected at least one head");
  VDIT_CHECK(x.size(1) <= kMaxTokens, what, " has ", x.size(1), " tokens; at most ", kMaxTokens);
  return rows;
}

void check_same_kind(const Tensor& t, const std::string& what, const Tensor& x, const char* x_name) {
  VDIT_CHECK(t.scalar_type() == x.scalar_type(), what, " is ", dtype_text(t.scalar_type()), " but ", x_name, " is ",
             dtype_text(x.scalar_type()), "; convert them to one dtype");
  VDIT_CHECK(same_device(t, x), what, " is on ", device_text(t), " but ", x_name, " is on ", device_text(x),
             "; move them to one device");
}

// The input of the denominator, of the shape of x.
TokenRows denominator(const Optional& t, const std::string& what, const Tensor& x, const char* x_name) {
  if (!t) return {};
  check_same_kind(*t, what, x, x_name);
  bool same = t->dim() == 4;
  for (int i = 0; i < 4 && same; ++i) same = t->size(i) == x.size(i);
  VDIT_CHECK(same, what, " has shape ", shape_text(*t), "; expected that of ", x_name, ", ", shape_text(x));
  return token_rows(*t, what);
}

LinearWeight weight_view(const Optional& w, const std::string& op, const Tensor& x, FeatureMap map) {
  if (!w) return {};
  const std::string what = op + ": weight";
  VDIT_CHECK(map == FeatureMap::hedgehog, what, " is given, but only feature_map 0 (hedgehog) has one; leave it out");
  const DType dtype = kernel_dtype(*w, what);
  VDIT_CHECK(w->scalar_type() == ScalarType::Float || w->scalar_type() == x.scalar_type(), what, " is ",
             dtype_text(w->scalar_type()), " but the tokens are ", dtype_text(x.scalar_type()),
             "; convert it to that or to float32");
  VDIT_CHECK(same_device(*w, x), what, " is on ", device_text(*w), " but the tokens are on ", device_text(x),
             "; move them to one device");
  const int64_t dim = x.size(3), heads = x.size(2), last = w->dim() - 1;
  VDIT_CHECK(
      (w->dim() == 2 || (w->dim() == 3 && w->size(0) == heads)) && w->size(last) == dim && w->size(last - 1) == dim,
      what, " has shape ", shape_text(*w), "; expected [dim, dim] or [heads, dim, dim] = [", heads, ", ", dim, ", ",
      dim, "]");
  VDIT_CHECK(dim == 1 || w->stride(last) == 1, what, " has stride ", w->stride(last),
             " in its last dimension; it must be contiguous there: call .contiguous()");
  return {w->const_data_ptr(), w->dim() == 2 || heads == 1 ? 0 : w->stride(0), w->stride(last - 1), dtype};
}

// Checks everything, allocates the result and points the parameters at it.
LinearStateParams prepare_state(const Tensor& k, const Tensor& v, int64_t map, const Optional& weight,
                                const Optional& k_den, const Optional& kv_len, Tensor& state) {
  const std::string op = "linear_attention_state";
  LinearStateParams p{};
  p.map = feature_map(map, op);
  p.dtype = kernel_dtype(k, op + ": k");
  p.k = tokens(k, op + ": k", kLinearMaxDim);
  check_same_kind(v, op + ": v", k, "k");
  p.v = tokens(v, op + ": v", kLinearMaxDim);
  VDIT_CHECK(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2), op, ": v has shape ",
             shape_text(v), " but k has ", shape_text(k), "; batch, tokens and heads must agree");
  p.k_den = denominator(k_den, op + ": k_den", k, "k");
  p.weight = weight_view(weight, op, k, p.map);
  p.kv_len = token_limits(kv_len, op + ": kv_len", k);
  p.batch = int32_t(k.size(0));
  p.heads = int32_t(k.size(2));
  p.length = int32_t(k.size(1));
  p.dim = int32_t(k.size(3));
  p.dim_v = int32_t(v.size(3));
  state = torch::stable::new_empty(k, {p.batch, p.heads, feature_count(p.map, p.dim), p.dim_v + 1}, ScalarType::Float);
  p.state = state.mutable_data_ptr<float>();
  return p;
}

LinearReadoutParams prepare_readout(const Tensor& q, const Tensor& state, int64_t map, const Optional& weight,
                                    const Optional& q_den, double eps, Tensor& out) {
  const std::string op = "linear_attention_readout";
  LinearReadoutParams p{};
  p.map = feature_map(map, op);
  p.dtype = kernel_dtype(q, op + ": q");
  p.q = tokens(q, op + ": q", kLinearMaxDim);
  const int64_t features = feature_count(p.map, int(q.size(3)));
  VDIT_CHECK(state.scalar_type() == ScalarType::Float && state.is_contiguous() && same_device(state, q), op,
             ": state is ", dtype_text(state.scalar_type()), state.is_contiguous() ? "" : ", not contiguous", " on ",
             device_text(state), "; expected contiguous float32 on ", device_text(q));
  VDIT_CHECK(state.dim() == 4 && state.size(0) == q.size(0) && state.size(2) == features && state.size(3) >= 2 &&
                 state.size(3) <= kLinearMaxDim + 1,
             op, ": state has shape ", shape_text(state), "; expected [batch, kv heads, features, 2 to ",
             kLinearMaxDim + 1, "] = [", q.size(0), ", kv heads, ", features, ", dim of v + 1]");
  VDIT_CHECK(state.size(1) >= 1 && q.size(2) % state.size(1) == 0, op, ": ", q.size(2),
             " query heads are not a multiple of the ", state.size(1), " heads of state");
  VDIT_CHECK(std::isfinite(float(eps)) && eps >= 0, op, ": eps is ", eps, "; expected a finite number of at least 0");
  p.q_den = denominator(q_den, op + ": q_den", q, "q");
  p.weight = weight_view(weight, op, q, p.map);
  p.state = state.const_data_ptr<float>();
  p.batch = int32_t(q.size(0));
  p.heads = int32_t(q.size(2));
  p.kv_heads = int32_t(state.size(1));
  p.length = int32_t(q.size(1));
  p.dim = int32_t(q.size(3));
  p.dim_v = int32_t(state.size(3) - 1);
  p.eps = float(eps);
  out = torch::stable::new_empty(q, {p.batch, p.length, p.heads, p.dim_v});
  p.out = out.mutable_data_ptr();
  return p;
}

Tensor state_cpu(const Tensor& k, const Tensor& v, int64_t map, const Optional& weight, const Optional& k_den,
                 const Optional& kv_len) {
  Tensor state;
  const LinearStateParams p = prepare_state(k, v, map, weight, k_den, kv_len, state);
  std::vector<int64_t> lengths;
  if (kv_len) lengths = lengths_of(*kv_len, p.length, "linear_attention_state");
  linear_state_cpu(p, kv_len ? lengths.data() : nullptr, parallel_for_each);
  return state;
}

Tensor readout_cpu(const Tensor& q, const Tensor& state, int64_t map, const Optional& weight, const Optional& q_den,
                   double eps) {
  Tensor out;
  const LinearReadoutParams p = prepare_readout(q, state, map, weight, q_den, eps, out);
  linear_readout_cpu(p, parallel_for_each);
  return out;
}

#ifdef VDIT_CUDA

int32_t processors_of(int32_t device, const char* op) {
  DeviceLimits limits{};
  check_cuda(cuda_device_limits(device, &limits), op);
  VDIT_CHECK(limits.compute_capability >= 80, op, ": cuda:", device, " has compute capability ",
             limits.compute_capability / 10, ".", limits.compute_capability % 10, "; the kernels need 8.0 or newer");
  return limits.processors;
}

Tensor state_cuda(const Tensor& k, const Tensor& v, int64_t map, const Optional& weight, const Optional& k_den,
                  const Optional& kv_len) {
  const int32_t device = k.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor state;
  const LinearStateParams p = prepare_state(k, v, map, weight, k_den, kv_len, state);
  const int32_t splits = linear_state_splits(p, processors_of(device, "linear_attention_state"));
  // Freed when this function returns, and reused only by later work of the same stream.
  const auto floats = static_cast<int64_t>(linear_state_workspace(p, splits));
  Tensor workspace = torch::stable::new_empty(k, {floats}, ScalarType::Float);
  check_cuda(cuda_linear_state(p, splits, workspace.mutable_data_ptr<float>(), current_cuda_stream(device)),
             "linear_attention_state");
  return state;
}

Tensor readout_cuda(const Tensor& q, const Tensor& state, int64_t map, const Optional& weight, const Optional& q_den,
                    double eps) {
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out;
  const LinearReadoutParams p = prepare_readout(q, state, map, weight, q_den, eps, out);
  check_cuda(cuda_linear_readout(p, processors_of(device, "linear_attention_readout"), current_cuda_stream(device)),
             "linear_attention_readout");
  return out;
}

#else

Tensor state_cuda(const Tensor&, const Tensor&, int64_t, const Optional&, const Optional&, const Optional&) {
  fail_without_cuda("linear_attention_state");
}

Tensor readout_cuda(const Tensor&, const Tensor&, int64_t, const Optional&, const Optional&, double) {
  fail_without_cuda("linear_attention_readout");
}

#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) {
  m.impl("linear_attention_readout", TORCH_BOX(&vdit::readout_cpu));
  m.impl("linear_attention_state", TORCH_BOX(&vdit::state_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) {
  m.impl("linear_attention_readout", TORCH_BOX(&vdit::readout_cuda));
  m.impl("linear_attention_state", TORCH_BOX(&vdit::state_cuda));
}

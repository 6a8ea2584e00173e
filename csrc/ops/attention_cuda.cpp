// attention on CUDA: checks, parameters, launch. Nothing on the device is read here: what is inside a plan, kv_len and
// the orders is clamped by the kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/attention_cuda_params.h"

namespace vdit {
namespace {

using Result = std::tuple<Tensor, Tensor>;

#ifdef VDIT_CUDA

Result attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& tiles, const Optional& run_ptr,
                      const Optional& runs, const Optional& mask_bits, const Optional& q_order,
                      const Optional& kv_order, int64_t plan_batch, int64_t plan_heads, double scale,
                      const Optional& row_scale, const Optional& kv_len, const Tensors& segment_k,
                      const Tensors& segment_v) {
  const gpu::AttentionParams p = cuda_params(q, k, v, tiles, run_ptr, runs, mask_bits, q_order, kv_order, plan_batch,
                                             plan_heads, scale, row_scale, kv_len, segment_k, segment_v);
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const gpu::ForwardOptions options = options_for(device);

  Result result{torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)}),
                torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float)};
  const gpu::AttentionOutputs outputs{std::get<0>(result).mutable_data_ptr(),
                                      std::get<1>(result).mutable_data_ptr<float>()};
  const auto bytes = static_cast<int64_t>(gpu::attention_workspace_bytes(p, options));
  // Freed when this function returns, and reused only by later work of the same stream.
  Tensor workspace = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
  check_cuda(gpu::attention_forward(p, outputs, bytes > 0 ? workspace.mutable_data_ptr() : nullptr, size_t(bytes),
                                    current_cuda_stream(device), options),
             "attention");
  return result;
}

#else

Result attention_cuda(const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&,
                      const Optional&, const Optional&, const Optional&, int64_t, int64_t, double, const Optional&,
                      const Optional&, const Tensors&, const Tensors&) {
  fail_without_cuda("attention");
}

#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("attention", TORCH_BOX(&vdit::attention_cuda)); }

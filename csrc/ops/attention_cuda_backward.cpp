// attention_backward on CUDA: checks, parameters, launch. Nothing on the device is read here.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/attention_cuda_params.h"

#ifdef VDIT_CUDA
#include "kernels/attention/backward.h"
#endif

namespace vdit {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors>;

#ifdef VDIT_CUDA

Tensor new_contiguous(const Tensor& t) {
  return torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)});
}

// The tensor itself if the kernels can read it, else a copy: what autograd brings has any strides, 0 among them.
Tensor with_aligned_rows(const Tensor& t) {
  if (has_aligned_rows(t)) return t;
  Tensor copy = new_contiguous(t);
  torch::stable::copy_(copy, t);
  return copy;
}

Gradients attention_backward_cuda(const Tensor& dout, const Optional& dlse, const Tensor& out, const Tensor& lse,
                                  const Tensor& q, const Tensor& k, const Tensor& v, const Optional& tiles,
                                  const Optional& run_ptr, const Optional& runs, const Optional& mask_bits,
                                  const Optional& q_order, const Optional& kv_order, int64_t plan_batch,
                                  int64_t plan_heads, double scale, const Optional& row_scale, const Optional& kv_len,
                                  const Tensors& segment_k, const Tensors& segment_v) {
  gpu::BackwardParams p{};
  p.forward = cuda_params(q, k, v, tiles, run_ptr, runs, mask_bits, q_order, kv_order, plan_batch, plan_heads, scale,
                          row_scale, kv_len, segment_k, segment_v);
  check_backward(dout, dlse, out, lse, q);
  VDIT_CHECK(q.size(3) <= gpu::kMaxBackwardDim, "attention_backward: head dim is ", q.size(3),
             "; gradients on CUDA are implemented up to ", gpu::kMaxBackwardDim, ": ", kElsewhere);
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  options_for(device);  // throws if the GPU is too old

  const Tensor dout_rows = with_aligned_rows(dout), out_rows = with_aligned_rows(out);
  p.dout = rows_of(dout_rows, "dout");
  p.out = rows_of(out_rows, "out");
  p.lse = lse.const_data_ptr<float>();
  p.dlse = dlse ? dlse->const_data_ptr<float>() : nullptr;

  Gradients result{new_contiguous(q), new_contiguous(k), new_contiguous(v), {}, {}};
  auto& [dq, dk, dv, segment_dk, segment_dv] = result;
  gpu::BackwardOutputs outputs{};
  outputs.dq = dq.mutable_data_ptr();
  outputs.dk = dk.mutable_data_ptr();
  outputs.dv = dv.mutable_data_ptr();
  for (size_t i = 0; i < segment_k.size(); ++i) {
    segment_dk.push_back(new_contiguous(segment_k[i]));
    segment_dv.push_back(new_contiguous(segment_v[i]));
    outputs.segment_dk[i] = segment_dk.back().mutable_data_ptr();
    outputs.segment_dv[i] = segment_dv.back().mutable_data_ptr();
    outputs.segment_batch[i] = int32_t(segment_k[i].size(0));
  }
  const auto bytes = static_cast<int64_t>(gpu::attention_backward_workspace_bytes(p));
  // Freed when this function returns, and reused only by later work of the same stream.
  Tensor workspace = torch::stable::new_empty(q, {bytes}, ScalarType::Byte);
  check_cuda(gpu::attention_backward(p, outputs, bytes > 0 ? workspace.mutable_data_ptr() : nullptr, size_t(bytes),
                                     current_cuda_stream(device)),
             "attention_backward");
  return result;
}

#else

Gradients attention_backward_cuda(const Tensor&, const Optional&, const Tensor&, const Tensor&, const Tensor&,
                                  const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&,
                                  const Optional&, const Optional&, const Optional&, int64_t, int64_t, double,
                                  const Optional&, const Optional&, const Tensors&, const Tensors&) {
  fail_without_cuda("attention_backward");
}

#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) {
  m.impl("attention_backward", TORCH_BOX(&vdit::attention_backward_cuda));
}

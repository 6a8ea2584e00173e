#include "cpu/adaln.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "ops/token_tables.h"
#ifdef VDIT_CUDA
#include "kernels/runtime.h"
#endif

namespace vdit {
namespace {

using Pair = std::tuple<Tensor, Tensor>;

class Call : public TokenCall<AdaLNParams> {
 public:
  Call(const char* op, const Tensor& x, bool eager) : TokenCall(op, x, eager) {
    VDIT_CHECK(x.dim() == 3 && x.size(2) >= 1 && x.size(2) <= kAdaLNMaxDim, op, ": x has shape ", shape_text(x),
               "; expected [batch, tokens, dim] with dim from 1 to ", kAdaLNMaxDim);
    p.batch = x.size(0);
    p.tokens = x.size(1);
    p.dim = int32_t(x.size(2));
    p.half = DType::f32;
    p.x = rows(x, "x");
  }

  void residual(const Tensor& y) {
    VDIT_CHECK(same_shape(y), op_, ": y has shape ", shape_text(y), " but x has ", shape_text(x_),
               "; expected one shape");
    p.y = rows(y, "y");
    new_ = torch::stable::new_empty(x_, {p.batch, p.tokens, p.dim});
    p.x_new = new_.mutable_data_ptr();
  }

  AdaLNNorm norm(const char* prefix, int64_t kind, double eps, const Optional& weight, const Optional& bias) {
    const std::string weight_name = prefix + std::string("weight"), bias_name = prefix + std::string("bias");
    VDIT_CHECK(kind >= 0 && kind <= 2, op_, ": ", prefix, "norm is ", kind, "; expected 0 (none), 1 (rms), 2 (layer)");
    AdaLNNorm n{NormKind(int32_t(kind)), float(eps), nullptr, nullptr, DType::f32, 0};
    VDIT_CHECK(eps >= 0., op_, ": ", prefix, "eps is ", eps, "; expected 0 or more");
    VDIT_CHECK(n.kind != NormKind::none || !weight, op_, ": ", weight_name, " needs a norm");
    VDIT_CHECK(n.kind == NormKind::layer || !bias, op_, ": ", bias_name, " needs the layer norm");
    if (weight) {
      n.weight = vector(*weight, weight_name);
      n.dtype = dtype(*weight, weight_name);
    }
    if (bias) {
      n.bias = vector(*bias, bias_name);
      const DType type = dtype(*bias, bias_name);
      VDIT_CHECK(!weight || type == n.dtype, op_, ": ", bias_name, " is ", dtype_text(bias->scalar_type()), " but ",
                 weight_name, " is ", dtype_text(weight->scalar_type()), "; convert them to one dtype");
      n.dtype = type;
    }
    n.round = eager_ && n.kind == NormKind::rms && weight && n.dtype != DType::f32;
    return n;
  }

  // After the tables.
  void index(const Optional& index) {
    tokens_of(index);
    if (p.gate.data != nullptr) rows_fit(p.gate, "gate");
    if (p.scale.data != nullptr) rows_fit(p.scale, "scale");
    if (p.shift.data != nullptr) rows_fit(p.shift, "shift");
  }

  // After everything else: what is rounded, and the result of the norm.
  void finish(bool with_norm) {
    const bool half_x = p.x.dtype != DType::f32, half_y = p.y.data != nullptr && p.y.dtype != DType::f32;
    const bool wide_rms = p.norm.kind == NormKind::rms && p.norm.weight != nullptr && p.norm.dtype == DType::f32;
    p.round_gated = p.gate.round && half_y;
    p.round_post = (eager_ && half_y && p.post.kind == NormKind::layer) || p.post.round;
    p.round_new = eager_ && half_x;
    p.round_chain = (p.scale.data != nullptr ? p.scale.round : p.shift.round) && half_x && !wide_rms;
    if (p.half == DType::f32) p.half = DType::bf16;  // there is no 16-bit tensor
    if (with_norm) {
      h_ = torch::stable::new_empty(x_, {p.batch, p.tokens, p.dim});
      p.h = h_.mutable_data_ptr();
    }
  }

  void run_cpu() const {
    check_indices();
    constexpr int64_t kElementsPerTask = 1 << 15;
    const int64_t scratch = (int64_t(p.dim) + 15) / 16 * 16 * kAdaLNScratchRows;
    torch::stable::parallel_for(0, p.batch * p.tokens, std::max<int64_t>(1, kElementsPerTask / p.dim),
                                [this, scratch](int64_t first, int64_t last) {
                                  std::vector<float> buffer(static_cast<size_t>(scratch));
                                  cpu_adaln(p, first, last, buffer.data());
                                });
  }

#ifdef VDIT_CUDA
  void run_cuda() const {
    const int32_t device = x_.get_device_index();
    DeviceLimits limits{};
    check_cuda(cuda_device_limits(device, &limits), op_);
    check_cuda(cuda_adaln(p, limits.processors, current_cuda_stream(device)), op_);
  }
#endif

  const Tensor& x_new() const { return new_; }
  const Tensor& h() const { return h_; }

 private:
  Tensor new_, h_;
};

Call modulate(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& scale_base,
              const Optional& shift_base, const Optional& index, int64_t norm, double eps, const Optional& weight,
              const Optional& bias, bool eager) {
  Call call("adaln_modulate", x, eager);
  call.p.norm = call.norm("", norm, eps, weight, bias);
  call.p.scale = call.table("scale", scale, scale_base);
  call.p.shift = call.table("shift", shift, shift_base);
  call.index(index);
  call.finish(true);
  return call;
}

Call residual(const Tensor& x, const Tensor& y, const Optional& gate, const Optional& gate_base, const Optional& index,
              bool tanh_gate, int64_t post_norm, double post_eps, const Optional& post_weight,
              const Optional& post_bias, bool eager) {
  Call call("gate_residual", x, eager);
  call.residual(y);
  call.p.post = call.norm("post_", post_norm, post_eps, post_weight, post_bias);
  call.p.gate = call.table("gate", gate, gate_base);
  call.p.tanh_gate = tanh_gate;
  call.index(index);
  call.finish(false);
  return call;
}

Call residual_norm(const Tensor& x, const Tensor& y, const Optional& gate, const Optional& scale, const Optional& shift,
                   const Optional& gate_base, const Optional& scale_base, const Optional& shift_base,
                   const Optional& index, bool tanh_gate, int64_t post_norm, double post_eps,
                   const Optional& post_weight, const Optional& post_bias, int64_t norm, double eps,
                   const Optional& weight, const Optional& bias, bool eager) {
  Call call("gate_residual_norm", x, eager);
  call.residual(y);
  call.p.post = call.norm("post_", post_norm, post_eps, post_weight, post_bias);
  call.p.norm = call.norm("", norm, eps, weight, bias);
  call.p.gate = call.table("gate", gate, gate_base);
  call.p.scale = call.table("scale", scale, scale_base);
  call.p.shift = call.table("shift", shift, shift_base);
  call.p.tanh_gate = tanh_gate;
  call.index(index);
  call.finish(true);
  return call;
}

struct Cpu {
  template <class Make>
  static Call run(const char*, const Tensor&, Make make) {
    Call call = make();
    call.run_cpu();
    return call;
  }
};

struct Cuda {
  template <class Make>
  static Call run([[maybe_unused]] const char* op, [[maybe_unused]] const Tensor& x, [[maybe_unused]] Make make) {
#ifdef VDIT_CUDA
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    Call call = make();
    call.run_cuda();
    return call;
#else
    fail_without_cuda(op);
#endif
  }
};

template <class Device>
Tensor adaln_modulate(const Tensor& x, const Optional& scale, const Optional& shift, const Optional& scale_base,
                      const Optional& shift_base, const Optional& index, int64_t norm, double eps,
                      const Optional& weight, const Optional& bias, bool eager) {
  return Device::run(
             "adaln_modulate", x,
             [&] { return modulate(x, scale, shift, scale_base, shift_base, index, norm, eps, weight, bias, eager); })
      .h();
}

template <class Device>
Tensor gate_residual(const Tensor& x, const Tensor& y, const Optional& gate, const Optional& gate_base,
                     const Optional& index, bool tanh_gate, int64_t post_norm, double post_eps,
                     const Optional& post_weight, const Optional& post_bias, bool eager) {
  return Device::run("gate_residual", x,
                     [&] {
                       return residual(x, y, gate, gate_base, index, tanh_gate, post_norm, post_eps, post_weight,
                                       post_bias, eager);
                     })
      .x_new();
}

template <class Device>
Pair gate_residual_norm(const Tensor& x, const Tensor& y, const Optional& gate, const Optional& scale,
                        const Optional& shift, const Optional& gate_base, const Optional& scale_base,
                        const Optional& shift_base, const Optional& index, bool tanh_gate, int64_t post_norm,
                        double post_eps, const Optional& post_weight, const Optional& post_bias, int64_t norm,
                        double eps, const Optional& weight, const Optional& bias, bool eager) {
  const Call call = Device::run("gate_residual_norm", x, [&] {
    return residual_norm(x, y, gate, scale, shift, gate_base, scale_base, shift_base, index, tanh_gate, post_norm,
                         post_eps, post_weight, post_bias, norm, eps, weight, bias, eager);
  });
  return {call.x_new(), call.h()};
}

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) {
  m.impl("adaln_modulate", TORCH_BOX(&vdit::adaln_modulate<vdit::Cpu>));
  m.impl("gate_residual", TORCH_BOX(&vdit::gate_residual<vdit::Cpu>));
  m.impl("gate_residual_norm", TORCH_BOX(&vdit::gate_residual_norm<vdit::Cpu>));
}
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) {
  m.impl("adaln_modulate", TORCH_BOX(&vdit::adaln_modulate<vdit::Cuda>));
  m.impl("gate_residual", TORCH_BOX(&vdit::gate_residual<vdit::Cuda>));
  m.impl("gate_residual_norm", TORCH_BOX(&vdit::gate_residual_norm<vdit::Cuda>));
}

#include "cpu/adaln.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/common.h"
#ifdef VDIT_CUDA
#include "kernels/runtime.h"
#endif

namespace vdit {
namespace {

using Optional = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;

// Checks the arguments of one call and collects its parameters; a member checks what it is given against x.
class Call {
 public:
  AdaLNParams p{};

  Call(const char* op, const Tensor& x, bool eager) : op_(op), x_(x), eager_(eager) {
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

  AdaLNTable table(const char* name, const Optional& data, const Optional& base) {
    AdaLNTable t{};
    const std::string base_name = name + std::string("_base");
    VDIT_CHECK(data || !base, op_, ": ", base_name, " without ", name, "; pass ", base_name, " as ", name, " then");
    if (!data) return t;
    VDIT_CHECK(data->dim() == 3 && (data->size(0) == 1 || data->size(0) == p.batch) && data->size(2) == p.dim, op_,
               ": ", name, " has shape ", shape_text(*data), "; expected [1 or ", p.batch, ", rows, ", p.dim, "]");
    last_contiguous(*data, name);
    same_place(*data, name);
    const DType type = dtype(*data, name);
    VDIT_CHECK(!any_row_ || type == p.row_dtype, op_, ": ", name, " is ", dtype_text(data->scalar_type()),
               " but another table is not; convert gate, scale and shift to one dtype");
    p.row_dtype = type;
    t.data = data->const_data_ptr();
    t.batch_stride = data->size(0) == 1 ? 0 : data->stride(0);
    t.row_stride = data->stride(1);
    VDIT_CHECK(data->size(1) >= 1 || p.batch * p.tokens == 0, op_, ": ", name, " has no rows");
    VDIT_CHECK(data->size(1) <= INT32_MAX, op_, ": ", name, " has ", data->size(1), " rows; at most ", INT32_MAX);
    t.rows = int32_t(data->size(1));
    any_row_ = true;
    if (base) {
      t.base = vector(*base, base_name);
      const DType base_type = dtype(*base, base_name);
      VDIT_CHECK(!any_base_ || base_type == p.base_dtype, op_, ": ", base_name, " is ", dtype_text(base->scalar_type()),
                 " but another base is not; convert the bases to one dtype");
      p.base_dtype = base_type;
      any_base_ = true;
    }
    t.round = eager_ && type != DType::f32 && (!base || p.base_dtype != DType::f32);
    return t;
  }

  // After the tables.
  void index(const Optional& index) {
    if (index) {
      VDIT_CHECK(index->scalar_type() == ScalarType::Int, op_, ": index is ", dtype_text(index->scalar_type()),
                 "; convert it to int32");
      const int64_t dims = index->dim();
      VDIT_CHECK((dims == 1 || (dims == 2 && index->size(0) == p.batch)) && index->size(dims - 1) == p.tokens, op_,
                 ": index has shape ", shape_text(*index), "; expected [", p.tokens, "] or [", p.batch, ", ", p.tokens,
                 "]");
      same_place(*index, "index");
      p.index = index->const_data_ptr<int32_t>();
      p.index_batch_stride = dims == 2 ? index->stride(0) : 0;
      p.index_stride = index->stride(dims - 1);
    }
    const struct {
      const char* name;
      const AdaLNTable& table;
    } all[] = {{"gate", p.gate}, {"scale", p.scale}, {"shift", p.shift}};
    for (const auto& [name, t] : all) {
      if (t.data == nullptr) continue;
      if (t.rows <= 1) continue;
      VDIT_CHECK(index || t.rows == p.tokens, op_, ": ", name, " has ", t.rows, " rows for ", p.tokens,
                 " tokens; pass one row, one per token, or an index");
      VDIT_CHECK(rows_ == 0 || rows_ == t.rows, op_, ": ", name, " has ", t.rows, " rows but another table ", rows_,
                 "; one index serves all tables");
      rows_ = t.rows;
    }
  }

  // On a CPU: every index inside its table.
  void check_indices() const {
    if (p.index == nullptr || rows_ == 0) return;
    const int64_t batches = p.index_batch_stride == 0 ? std::min<int64_t>(p.batch, 1) : p.batch;
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t n = 0; n < p.tokens; ++n) {
        const int32_t row = p.index[b * p.index_batch_stride + n * p.index_stride];
        VDIT_CHECK(row >= 0 && row < rows_, op_, ": index ", row, " of token ", n, " is outside the table's ", rows_,
                   " rows");
      }
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
  bool same_shape(const Tensor& t) const {
    return std::equal(t.sizes().begin(), t.sizes().end(), x_.sizes().begin(), x_.sizes().end());
  }

  void same_place(const Tensor& t, const std::string& name) const {
    VDIT_CHECK(same_device(t, x_), op_, ": ", name, " is on ", device_text(t), " but x is on ", device_text(x_),
               "; move them to one device");
  }

  void last_contiguous(const Tensor& t, const std::string& name) const {
    const int64_t last = t.dim() - 1;
    VDIT_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op_, ": ", name, " has stride ", t.stride(last),
               " in its last dimension; it must be contiguous there: call .contiguous()");
  }

  // float32, or the one 16-bit dtype of the call.
  DType dtype(const Tensor& t, const std::string& name) {
    const DType type = kernel_dtype(t, std::string(op_) + ": " + name);
    if (type == DType::f32) return type;
    VDIT_CHECK(p.half == DType::f32 || p.half == type, op_, ": ", name, " is ", dtype_text(t.scalar_type()),
               " beside the other 16-bit dtype; convert it");
    p.half = type;
    return type;
  }

  AdaLNRows rows(const Tensor& t, const char* name) {
    last_contiguous(t, name);
    same_place(t, name);
    return {t.const_data_ptr(), t.stride(0), t.stride(1), dtype(t, name)};
  }

  const void* vector(const Tensor& t, const std::string& name) const {
    VDIT_CHECK(t.dim() == 1 && t.size(0) == p.dim, op_, ": ", name, " has shape ", shape_text(t), "; expected [", p.dim,
               "]");
    last_contiguous(t, name);
    same_place(t, name);
    return t.const_data_ptr();
  }

  const char* op_;
  Tensor x_, new_, h_;
  bool eager_, any_row_ = false, any_base_ = false;
  int32_t rows_ = 0;  // of the tables with more than one
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

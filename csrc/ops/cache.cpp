#include "cpu/cache.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "cpu/pages.h"
#include "ops/overlap.h"
#include "ops/token_tables.h"

namespace vdit {
namespace {

constexpr int64_t kFlatRow = 1 << 14;  // elements per row of a tensor that is contiguous as a whole
constexpr int64_t kElementsPerTask = 1 << 15;
constexpr int64_t kStreamBytes = int64_t{32} << 20;  // results as large as a last-level cache do not stay in it

int64_t count(const Tensor& t) {
  int64_t n = 1;
  for (const int64_t size : t.sizes()) n *= size;
  return n;
}

// Contiguous in the dimensions from this one on.
bool dense_from(const Tensor& t, int64_t from = 0) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= from; expected *= t.size(i--))
    if (t.size(i) > 1 && t.stride(i) != expected) return count(t) == 0;
  return true;
}

bool same_view(const Tensor& a, const Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || a.scalar_type() != b.scalar_type()) return false;
  for (int64_t i = 0; i < a.dim(); ++i)
    if (a.size(i) > 1 && a.stride(i) != b.stride(i)) return false;
  return true;
}

// A tensor that the kernels walk over as rows, with its name.
struct Walked {
  const char* name;
  const Tensor* tensor;
  AdaLNRows* rows;
};

template <class Params>
class Call : public TokenCall<Params> {
  using Base = TokenCall<Params>;

 protected:
  using Base::anchor_, Base::dtype, Base::op_, Base::same_place, Base::same_shape, Base::x_;

 public:
  using Base::p;

  Call(const char* op, const Tensor& x, bool eager, const char* anchor) : Base(op, x, eager, anchor) {
    p.half = DType::f32;
    p.total = count(x);
  }

  // Factors [m, *x.shape], each contiguous. `used`: how many the call touches.
  int64_t factors(const Tensor& t, const std::string& name, int64_t used, int64_t& stride) {
    const bool fits = t.dim() == x_.dim() + 1 && t.size(0) >= 1 && t.size(0) <= kMaxFactors &&
                      std::equal(x_.sizes().begin(), x_.sizes().end(), t.sizes().begin() + 1);
    VDIT_CHECK(fits, op_, ": ", name, " has shape ", shape_text(t), "; expected [1 to ", kMaxFactors,
               ", *] with the shape ", shape_text(x_), " of ", anchor_);
    VDIT_CHECK(used <= t.size(0), op_, ": ", used, " factors are asked for but ", name, " has ", t.size(0));
    VDIT_CHECK(dense_from(t, 1) && (t.size(0) == 1 || t.stride(0) >= p.total), op_, ": ", name,
               " has strides between which its factors are not contiguous; make it with torch.empty");
    same_place(t, name);
    stride = t.stride(0);
    return t.size(0);
  }

  // Of factors in e4m3 the scales [m, *x.shape without D], each factor's contiguous; others have none.
  void scales(const Tensor& t, const std::string& name, const Optional& scales, const std::string& scales_name,
              int64_t& stride) {
    const ScalarType type = t.scalar_type();
    const bool codes = type == ScalarType::Float8_e4m3fn;
    VDIT_CHECK(!factor_type_ || type == *factor_type_, op_, ": ", name, " is ", dtype_text(type),
               " but the first module's factors are not; keep all modules in one dtype");
    factor_type_ = type;
    if (!codes) {
      VDIT_CHECK(!scales, op_, ": ", scales_name, " beside factors in ", dtype_text(type),
                 "; only those in float8_e4m3fn have scales: pass None");
      p.factor_dtype = dtype(t, name);
      return;
    }
    VDIT_CHECK(scales, op_, ": ", name, " is float8_e4m3fn without ", scales_name,
               "; pass a float32 tensor of the shape of factors without the last dimension");
    const int64_t rows = t.dim() - 1;
    VDIT_CHECK(rows >= 1 && scales->dim() == rows &&
                   std::equal(scales->sizes().begin(), scales->sizes().end(), t.sizes().begin()),
               op_, ": ", scales_name, " has shape ", shape_text(*scales), "; expected that of ", name, ", ",
               shape_text(t), ", without the last dimension");
    VDIT_CHECK(scales->scalar_type() == ScalarType::Float, op_, ": ", scales_name, " is ",
               dtype_text(scales->scalar_type()), "; expected float32");
    VDIT_CHECK(t.size(rows) <= kMaxScaledRow, op_, ": ", name, " has rows of ", t.size(rows), " elements; at most ",
               kMaxScaledRow, " share a scale: keep longer ones in another dtype");
    same_place(*scales, scales_name);
    VDIT_CHECK(
        dense_from(*scales, 1) && (scales->size(0) == 1 || scales->stride(0) >= count(*scales) / scales->size(0)), op_,
        ": ", scales_name,
        " has strides between which the scales of a factor are not contiguous; make it "
        "with torch.empty");
    stride = scales->stride(0);
  }

  // Sets the shape of the walk and the strides of everything walked over. `as_is`: [B, N, D] stays what it is. Rows
  // that have a scale stay rows.
  void walk(const std::vector<Walked>& all, bool as_is) {
    for (const Walked& w : all) {
      same_place(*w.tensor, w.name);
      VDIT_CHECK(same_shape(*w.tensor), op_, ": ", w.name, " has shape ", shape_text(*w.tensor), " but ", anchor_,
                 " has ", shape_text(x_), "; expected one shape");
      *w.rows = {w.tensor->const_data_ptr(), 0, 0, dtype(*w.tensor, w.name)};
    }
    if (as_is) set_shape(x_.size(0), x_.size(1), x_.size(2));
    if (p.total == 0) return;
    if (as_is) {
      for (const Walked& w : all) {
        this->last_contiguous(*w.tensor, w.name);
        w.rows->batch_stride = w.tensor->stride(0);
        w.rows->token_stride = w.tensor->stride(1);
      }
      return;
    }
    const bool scaled = factor_type_ == ScalarType::Float8_e4m3fn;
    if (!scaled && std::all_of(all.begin(), all.end(), [](const Walked& w) { return dense_from(*w.tensor); })) {
      set_shape(1, (p.total + kFlatRow - 1) / kFlatRow, std::min(p.total, kFlatRow));
      for (const Walked& w : all) w.rows->token_stride = kFlatRow;
      return;
    }
    collapse(all, scaled);
  }

 private:
  void set_shape(int64_t batch, int64_t tokens, int64_t dim) {
    VDIT_CHECK(dim <= INT32_MAX, op_, ": rows of ", dim, " elements; at most ", INT32_MAX);
    p.batch = batch;
    p.tokens = tokens;
    p.dim = int32_t(dim);
  }

  // Joins dimensions that are one in every tensor, the last one only where no rows are wanted; at most three may
  // remain.
  void collapse(const std::vector<Walked>& all, bool rows) {
    std::vector<int64_t> sizes, dims;  // from the innermost: joint size, and the dimension whose stride it steps by
    if (rows) {
      sizes.push_back(x_.size(x_.dim() - 1));
      dims.push_back(x_.dim() - 1);
    }
    for (int64_t i = x_.dim() - 1 - int64_t(rows); i >= 0; --i) {
      if (x_.size(i) == 1) continue;
      const bool joins = sizes.size() > size_t(rows) && std::all_of(all.begin(), all.end(), [&](const Walked& w) {
                           return w.tensor->stride(i) == w.tensor->stride(dims.back()) * sizes.back();
                         });
      if (joins) {
        sizes.back() *= x_.size(i);
      } else {
        sizes.push_back(x_.size(i));
        dims.push_back(i);
      }
    }
    for (const Walked& w : all) {
      const bool fits = sizes.size() <= 3 && (sizes[0] == 1 || w.tensor->stride(dims[0]) == 1);
      VDIT_CHECK(fits, op_, ": ", w.name,
                 " has a layout that is not [outer, rows, contiguous row]; call .contiguous()");
      w.rows->token_stride = sizes.size() > 1 ? w.tensor->stride(dims[1]) : 0;
      w.rows->batch_stride = sizes.size() > 2 ? w.tensor->stride(dims[2]) : 0;
    }
    set_shape(sizes.size() > 2 ? sizes[2] : 1, sizes.size() > 1 ? sizes[1] : 1, sizes[0]);
  }

  std::optional<ScalarType> factor_type_;
};

class Update : public Call<FactorUpdateParams> {
 public:
  Update(const Tensor& factors, const Tensor& output, const Optional& minus, double distance, int64_t known,
         const Optional& scales)
      : Call("factor_update", output, false, "output") {
    const int64_t held = this->factors(factors, "factors", 1, p.factor_stride);
    this->scales(factors, "factors", scales, "scales", p.scale_stride);
    // First: this makes copies that torch has put off, and what shares memory is asked below.
    p.factors = factors.mutable_data_ptr();
    p.scales = scales ? scales->mutable_data_ptr<float>() : nullptr;
    VDIT_CHECK(known >= 0 && known <= held, "factor_update: known is ", known, "; expected 0 to ", held,
               ", the number of factors");
    p.last = int32_t(std::min(known, held - 1));
    p.distance = float(distance);
    VDIT_CHECK(p.last == 0 || (std::isfinite(p.distance) && p.distance != 0.f), "factor_update: distance is ", distance,
               "; expected the steps since the last output, finite and not 0");
    std::vector<Walked> all{{"output", &output, &p.output}};
    if (minus) all.push_back({"minus", &*minus, &p.minus});
    walk(all, false);
    VDIT_CHECK(!minus || p.minus.dtype == p.output.dtype, "factor_update: minus is ", dtype_text(minus->scalar_type()),
               " but output is ", dtype_text(output.scalar_type()), "; convert it");
    if (p.half == DType::f32) p.half = DType::bf16;  // there is no 16-bit tensor
    for (const Walked& w : all) {
      check_overlap(factors, *w.tensor, w.name);
      VDIT_CHECK(!scales || !share_memory(*scales, *w.tensor), "factor_update: ", w.name,
                 " overlaps scales; pass a copy of it");
    }
    VDIT_CHECK(!scales || !share_memory(*scales, factors),
               "factor_update: scales overlaps factors; pass memory of its own");
    p.stream = p.total * int64_t(factors.element_size()) >= kStreamBytes;
  }

  void run_cpu() const {
    if (p.total == 0) return;
    const int64_t scratch = p.scales == nullptr ? 0 : (int64_t(p.dim) + 15) / 16 * 16 * (p.last + 1);
    torch::stable::parallel_for(0, p.batch * p.tokens, std::max<int64_t>(1, kElementsPerTask / p.dim),
                                [this, scratch](int64_t first, int64_t last) {
                                  if (scratch == 0) return cpu_factor_update(p, first, last);
                                  std::vector<float> buffer(static_cast<size_t>(scratch));
                                  cpu_factor_update_e4m3(p, first, last, buffer.data());
                                });
  }

#ifdef VDIT_CUDA
  void run_cuda() const { check_cuda(cuda_factor_update(p, current_cuda_stream(x_.get_device_index())), op_); }
#endif

 private:
  // An element may be what is written where it is read, never elsewhere.
  static void check_overlap(const Tensor& factors, const Tensor& t, const char* name) {
    if (!share_memory(factors, t)) return;
    const auto* first = static_cast<const char*>(factors.const_data_ptr());
    const int64_t bytes = factors.stride(0) * int64_t(factors.element_size());
    bool is_factor = t.scalar_type() == factors.scalar_type() && dense_from(t);
    const int64_t offset = static_cast<const char*>(t.const_data_ptr()) - first;
    is_factor = is_factor && (offset == 0 || (factors.size(0) > 1 && offset % bytes == 0));
    VDIT_CHECK(is_factor, "factor_update: ", name, " overlaps factors; pass a copy of it");
  }
};

class Forecast : public Call<ForecastParams> {
 public:
  Forecast(const Optional& x, const std::vector<Tensor>& factors, const std::vector<Optional>& gates,
           const std::vector<Optional>& bases, const Optional& index, const std::vector<double>& weights, bool eager,
           const std::vector<Optional>& scales, const Tensor& out)
      : Call("forecast_gate_add", x ? *x : out, eager, x ? "x" : "out") {
    const auto modules = int64_t(factors.size());
    VDIT_CHECK(modules >= 1 && modules <= kMaxForecastModules, op_, ": ", modules, " modules; expected 1 to ",
               kMaxForecastModules);
    VDIT_CHECK(int64_t(gates.size()) == modules && int64_t(bases.size()) == modules, op_, ": ", modules,
               " modules but ", gates.size(), " gates and ", bases.size(), " bases; pass one or None for each");
    VDIT_CHECK(int64_t(scales.size()) == modules, op_, ": ", modules, " modules but ", scales.size(),
               " scales; pass one or None for each");
    VDIT_CHECK(!weights.empty() && weights.size() <= size_t(kMaxFactors), op_, ": ", weights.size(),
               " weights; expected 1 to ", kMaxFactors);
    for (size_t i = 0; i < weights.size(); ++i) {
      p.weight[i] = float(weights[i]);
      VDIT_CHECK(std::isfinite(p.weight[i]), op_, ": weights[", i, "] is ", weights[i], "; expected a finite number");
    }
    p.modules = int32_t(modules);
    p.factors = int32_t(weights.size());
    const bool gated = std::any_of(gates.begin(), gates.end(), [](const Optional& g) { return g.has_value(); });
    VDIT_CHECK(!gated || x_.dim() == 3, op_, ": ", anchor_, " has shape ", shape_text(x_),
               "; with a gate, expected [batch, tokens, dim]");
    p.out = out.mutable_data_ptr();  // first: of a copy that torch has put off, x = out is where this puts it
    AdaLNRows to{};
    std::vector<Walked> all{{"out", &out, &to}};
    if (x) all.push_back({"x", &*x, &p.x});
    for (int64_t j = 0; j < modules; ++j) {
      const std::string name = numbered("factors", j);
      ForecastModule& m = p.module[j];
      this->factors(factors[j], name, p.factors, m.factor_stride);
      this->scales(factors[j], name, scales[j], numbered("scales", j), m.scale_stride);
    }
    walk(all, gated);
    p.out_batch_stride = to.batch_stride;
    p.out_token_stride = to.token_stride;
    p.out_dtype = to.dtype;
    VDIT_CHECK(!x || p.x.dtype == p.out_dtype, op_, ": out is ", dtype_text(out.scalar_type()), " but x is ",
               dtype_text(x->scalar_type()), "; expected one dtype");
    const bool in_place = x && same_view(*x, out);
    VDIT_CHECK(p.total == 0 || is_own(), op_, ": elements of out share memory; pass a tensor that is not expanded");
    VDIT_CHECK(!x || in_place || !share_memory(*x, out), op_,
               ": out overlaps x without being it; pass x itself or memory of its own");
    for (int64_t j = 0; j < modules; ++j) {
      VDIT_CHECK(!share_memory(factors[j], out), op_, ": out overlaps ", numbered("factors", j),
                 "; pass memory of its own");
      const Optional& own = scales[j];
      VDIT_CHECK(!own || !share_memory(*own, out), op_, ": out overlaps ", numbered("scales", j),
                 "; pass memory of its own");
      ForecastModule& m = p.module[j];
      m.factors = factors[j].const_data_ptr();
      m.scales = own ? own->const_data_ptr<float>() : nullptr;
      m.gate = table(numbered("gate", j), gates[j], bases[j]);
    }
    for (const auto* tables : {&gates, &bases})
      for (const Optional& t : *tables)
        VDIT_CHECK(!t || !share_memory(*t, out), op_, ": out overlaps a gate; pass a copy of the gate");
    VDIT_CHECK(!index || !share_memory(*index, out), op_, ": out overlaps index; pass memory of its own");
    VDIT_CHECK(gated || !index, op_, ": index without a gate; pass the gate whose rows it names");
    tokens_of(index);
    for (int64_t j = 0; j < modules; ++j) rows_fit(p.module[j].gate, numbered("gate", j));
    p.round = eager && p.out_dtype != DType::f32;
    if (p.half == DType::f32) p.half = DType::bf16;  // there is no 16-bit tensor
    p.stream = !in_place && p.total * int64_t(out.element_size()) >= kStreamBytes;
    gated_ = gated;
    if (p.stream && dense_from(out)) fresh_bytes_ = size_t(p.total) * out.element_size();
  }

  void run_cpu() const {
    if (p.total == 0) return;
    check_indices();
    if (fresh_bytes_ > 0) prefer_large_pages(p.out, fresh_bytes_);
    const int64_t scratch = gated_ ? (int64_t(p.dim) + 15) / 16 * 16 * p.modules : 0;
    torch::stable::parallel_for(0, p.batch * p.tokens, std::max<int64_t>(1, kElementsPerTask / p.dim),
                                [this, scratch](int64_t first, int64_t last) {
                                  std::vector<float> buffer(static_cast<size_t>(scratch));
                                  cpu_forecast_gate_add(p, first, last, buffer.data());
                                });
  }

#ifdef VDIT_CUDA
  void run_cuda() const { check_cuda(cuda_forecast_gate_add(p, current_cuda_stream(x_.get_device_index())), op_); }
#endif

 private:
  std::string numbered(const char* name, int64_t j) const {
    return p.modules == 1 ? name : name + ("[" + std::to_string(j) + "]");
  }

  // Whether no two elements of out are one.
  bool is_own() const {
    std::pair<int64_t, int64_t> outer[] = {{p.out_token_stride, p.tokens}, {p.out_batch_stride, p.batch}};
    if (outer[0] > outer[1]) std::swap(outer[0], outer[1]);
    int64_t extent = p.dim;
    for (const auto& [stride, size] : outer) {
      if (size <= 1) continue;
      if (stride < extent) return false;
      extent += (size - 1) * stride;
    }
    return true;
  }

  bool gated_ = false;
  size_t fresh_bytes_ = 0;  // of a result that malloc may have mapped for this call
};

struct Cpu {
  template <class Make>
  static void run(const char*, const Tensor&, Make make) {
    make().run_cpu();
  }
};

struct Cuda {
  template <class Make>
  static void run([[maybe_unused]] const char* op, [[maybe_unused]] const Tensor& t, [[maybe_unused]] Make make) {
#ifdef VDIT_CUDA
    const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
    make().run_cuda();
#else
    fail_without_cuda(op);
#endif
  }
};

template <class Device>
void factor_update(const Tensor& factors, const Tensor& output, const Optional& minus, double distance, int64_t known,
                   const Optional& scales) {
  Device::run("factor_update", factors, [&] { return Update(factors, output, minus, distance, known, scales); });
}

template <class Device>
void forecast_gate_add(const Optional& x, const std::vector<Tensor>& factors, const std::vector<Optional>& gates,
                       const std::vector<Optional>& bases, const Optional& index, const std::vector<double>& weights,
                       bool eager, const std::vector<Optional>& scales, const Tensor& out) {
  Device::run("forecast_gate_add", out,
              [&] { return Forecast(x, factors, gates, bases, index, weights, eager, scales, out); });
}

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) {
  m.impl("factor_update", TORCH_BOX(&vdit::factor_update<vdit::Cpu>));
  m.impl("forecast_gate_add", TORCH_BOX(&vdit::forecast_gate_add<vdit::Cpu>));
}
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) {
  m.impl("factor_update", TORCH_BOX(&vdit::factor_update<vdit::Cuda>));
  m.impl("forecast_gate_add", TORCH_BOX(&vdit::forecast_gate_add<vdit::Cuda>));
}

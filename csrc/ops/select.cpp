#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/select.h"
#include "ops/common.h"

namespace vdit {
namespace {

using Optional = std::optional<Tensor>;

// Checks the entries, copies them if they are not contiguous, allocates the result and describes both.
struct Selection {
  Tensor entries, keep;
  std::optional<Tensor> k;
  SelectParams params{};

  Selection(const char* op, const char* name, const Tensor& t, int64_t longest) {
    VDIT_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " is ", dtype_text(t.scalar_type()),
               "; convert it to float32");
    VDIT_CHECK(t.dim() >= 1 && t.size(t.dim() - 1) >= 1, op, ": ", name, " has shape ", shape_text(t),
               "; expected [..., n] with n at least 1");
    params.n = t.size(t.dim() - 1);
    VDIT_CHECK(params.n <= longest, op, ": ", name, " has rows of ", params.n, " entries; at most ", longest);
    params.rows = t.numel() / params.n;
    VDIT_CHECK(params.rows <= INT32_MAX, op, ": ", name, " has ", params.rows, " rows; at most ", INT32_MAX);
    entries = t.is_contiguous() ? t : torch::stable::contiguous(t);
    keep = torch::stable::new_empty(entries, t.sizes(), ScalarType::Bool);
    params.scores = entries.const_data_ptr<float>();
    params.keep = static_cast<uint8_t*>(keep.mutable_data_ptr());
  }
};

Selection top_k(const Tensor& scores, const Optional& k_rows, int64_t k) {
  Selection s("select_top_k", "scores", scores, kMaxRow);
  s.params.at_least = k;
  if (k_rows) {
    const ScalarType type = k_rows->scalar_type();
    VDIT_CHECK(type == ScalarType::Int || type == ScalarType::Long, "select_top_k: k is ", dtype_text(type),
               "; expected int32 or int64");
    VDIT_CHECK(same_device(*k_rows, scores), "select_top_k: k is on ", device_text(*k_rows), " but scores are on ",
               device_text(scores), "; move them to one device");
    const auto shape = k_rows->sizes(), want = scores.sizes();
    VDIT_CHECK(shape.size() + 1 == want.size() && std::equal(shape.begin(), shape.end(), want.begin()),
               "select_top_k: k has shape ", shape_text(*k_rows), " but scores have ", shape_text(scores),
               "; expected one k per row");
    s.k = torch::stable::contiguous(*k_rows);
    s.params.k_rows = s.k->const_data_ptr();
    s.params.k_bytes = type == ScalarType::Int ? 4 : 8;
  }
  return s;
}

Selection top_p(const Tensor& mass, double p, int64_t min_keep) {
  Selection s("select_top_p", "mass", mass, kMaxMassRow);
  VDIT_CHECK(p >= 0. && p <= 1., "select_top_p: p is ", p, "; expected a share in [0, 1]");
  s.params.at_least = min_keep;
  s.params.by_mass = true;
  s.params.p = p;
  return s;
}

Tensor run_cpu(const Selection& s) {
  const SelectParams& p = s.params;
  constexpr int64_t kEntriesPerTask = 1 << 14;
  torch::stable::parallel_for(0, p.rows, std::max<int64_t>(1, kEntriesPerTask / p.n),
                              [&p](int64_t first, int64_t last) {
                                std::vector<uint32_t> buffer(size_t(p.n) * 2);
                                cpu_select(p, first, last, buffer.data());
                              });
  return s.keep;
}

Tensor top_k_cpu(const Tensor& scores, const Optional& k_rows, int64_t k) { return run_cpu(top_k(scores, k_rows, k)); }
Tensor top_p_cpu(const Tensor& mass, double p, int64_t min_keep) { return run_cpu(top_p(mass, p, min_keep)); }

#ifdef VDIT_CUDA
Tensor run_cuda(const Selection& s, const char* op) {
  const int32_t device = s.entries.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(cuda_select(s.params, current_cuda_stream(device)), op);
  return s.keep;
}
Tensor top_k_cuda(const Tensor& scores, const Optional& k_rows, int64_t k) {
  return run_cuda(top_k(scores, k_rows, k), "select_top_k");
}
Tensor top_p_cuda(const Tensor& mass, double p, int64_t min_keep) {
  return run_cuda(top_p(mass, p, min_keep), "select_top_p");
}
#else
Tensor top_k_cuda(const Tensor&, const Optional&, int64_t) { fail_without_cuda("select_top_k"); }
Tensor top_p_cuda(const Tensor&, double, int64_t) { fail_without_cuda("select_top_p"); }
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) {
  m.impl("select_top_k", TORCH_BOX(&vdit::top_k_cpu));
  m.impl("select_top_p", TORCH_BOX(&vdit::top_p_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) {
  m.impl("select_top_k", TORCH_BOX(&vdit::top_k_cuda));
  m.impl("select_top_p", TORCH_BOX(&vdit::top_p_cuda));
}

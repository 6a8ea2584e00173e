#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/merge.h"
#include "ops/common.h"

namespace vdit {
namespace {

using Tensors = std::vector<Tensor>;
using Result = std::tuple<Tensor, Tensor>;

std::string item(const char* name, size_t i) { return "merge: " + (name + ("[" + std::to_string(i) + "]")); }

void check_part(const Tensors& outs, const Tensors& lses, size_t i) {
  const Tensor &out = outs[i], &lse = lses[i], &first = outs[0];
  VDIT_CHECK(out.dim() == 4, item("outs", i), " has shape ", shape_text(out), "; expected [batch, length, heads, dim]");
  VDIT_CHECK(std::equal(out.sizes().begin(), out.sizes().end(), first.sizes().begin()), item("outs", i), " has shape ",
             shape_text(out), " but outs[0] has ", shape_text(first), "; all parts must have one shape");
  VDIT_CHECK(out.scalar_type() == first.scalar_type(), item("outs", i), " is ", dtype_text(out.scalar_type()),
             " but outs[0] is ", dtype_text(first.scalar_type()), "; convert them to one dtype");
  VDIT_CHECK(lse.scalar_type() == ScalarType::Float, item("lses", i), " is ", dtype_text(lse.scalar_type()),
             "; log-sum-exps must be float32");
  VDIT_CHECK(lse.dim() == 3 && lse.size(0) == out.size(0) && lse.size(1) == out.size(2) && lse.size(2) == out.size(1),
             item("lses", i), " has shape ", shape_text(lse), "; expected [batch, heads, length] = [", out.size(0),
             ", ", out.size(2), ", ", out.size(1), "]");
  for (const Tensor* t : {&out, &lse}) {
    VDIT_CHECK(same_device(*t, first), item(t == &out ? "outs" : "lses", i), " is on ", device_text(*t),
               " but outs[0] is on ", device_text(first), "; move all parts to one device");
  }
}

// Checks everything, allocates the results and points the parameters at them.
MergeParams prepare(const Tensors& outs, const Tensors& lses, Result& result) {
  VDIT_CHECK(!outs.empty(), "merge: outs is empty; pass at least one part");
  VDIT_CHECK(outs.size() == lses.size(), "merge: ", outs.size(), " outs but ", lses.size(),
             " lses; every part needs one of each");
  VDIT_CHECK(outs.size() <= kMergeMaxParts, "merge: ", outs.size(), " parts; at most ", kMergeMaxParts,
             " at once, merge them in groups");
  for (size_t i = 0; i < outs.size(); ++i) check_part(outs, lses, i);

  const Tensor& first = outs[0];
  MergeParams p{};
  p.batch = first.size(0);
  p.length = first.size(1);
  p.heads = first.size(2);
  p.dim = first.size(3);
  p.dtype = kernel_dtype(first, item("outs", 0));
  p.parts = int32_t(outs.size());
  for (size_t i = 0; i < outs.size(); ++i) {
    MergePart& part = p.part[i];
    part.out = outs[i].const_data_ptr();
    part.lse = lses[i].const_data_ptr<float>();
    for (int k = 0; k < 4; ++k) part.out_stride[k] = outs[i].stride(k);
    for (int k = 0; k < 3; ++k) part.lse_stride[k] = lses[i].stride(k);
  }
  result = {torch::stable::new_empty(first, {p.batch, p.length, p.heads, p.dim}),
            torch::stable::new_empty(lses[0], {p.batch, p.heads, p.length})};
  p.out = std::get<0>(result).mutable_data_ptr();
  p.lse = std::get<1>(result).mutable_data_ptr<float>();
  return p;
}

Result merge_cpu(const Tensors& outs, const Tensors& lses) {
  Result result;
  const MergeParams p = prepare(outs, lses, result);
  constexpr int64_t kElementsPerTask = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, p.dim * p.parts));
  torch::stable::parallel_for(0, p.batch * p.length * p.heads, grain,
                              [&p](int64_t first, int64_t last) { cpu_merge(p, first, last); });
  return result;
}

#ifdef VDIT_CUDA
Result merge_cuda(const Tensors& outs, const Tensors& lses) {
  VDIT_CHECK(!outs.empty(), "merge: outs is empty; pass at least one part");
  const int32_t device = outs[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Result result;
  const MergeParams p = prepare(outs, lses, result);
  check_cuda(cuda_merge(p, current_cuda_stream(device)), "merge");
  return result;
}
#else
Result merge_cuda(const Tensors&, const Tensors&) { fail_without_cuda("merge"); }
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) { m.impl("merge", TORCH_BOX(&vdit::merge_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("merge", TORCH_BOX(&vdit::merge_cuda)); }

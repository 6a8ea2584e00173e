#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/counting_sort.h"
#include "ops/common.h"

namespace vdit {
namespace {

using Result = std::tuple<Tensor, Tensor>;

// Checks everything, allocates the results and points the parameters at them.
CountingSortParams prepare(const Tensor& labels, int64_t classes, Result& result) {
  VDIT_CHECK(labels.scalar_type() == ScalarType::Int, "counting_sort: labels is ", dtype_text(labels.scalar_type()),
             "; expected int32");
  VDIT_CHECK(labels.dim() == 3, "counting_sort: labels has shape ", shape_text(labels),
             "; expected [batch, heads, tokens]");
  constexpr int64_t kMost = (int64_t{1} << 31) - 4096;
  for (int i = 0; i < 3; ++i)
    VDIT_CHECK(labels.size(i) < kMost, "counting_sort: labels has shape ", shape_text(labels),
               "; sizes must fit 32 bits");
  VDIT_CHECK(classes >= 1 && classes < kMost, "counting_sort: classes is ", classes,
             "; expected at least 1 and 32 bits");
  const int64_t batch = labels.size(0), heads = labels.size(1), tokens = labels.size(2);
  result = {torch::stable::new_empty(labels, {batch, heads, tokens}),
            torch::stable::new_empty(labels, {batch, heads, classes})};
  return {{labels.const_data_ptr(), labels.stride(0), labels.stride(1), labels.stride(2), 4},
          int32_t(batch),
          int32_t(heads),
          int32_t(tokens),
          int32_t(classes),
          std::get<0>(result).mutable_data_ptr<int32_t>(),
          std::get<1>(result).mutable_data_ptr<int32_t>()};
}

Result counting_sort_cpu(const Tensor& labels, int64_t classes) {
  Result result;
  const CountingSortParams p = prepare(labels, classes, result);
  const int64_t rows = int64_t{p.batch} * p.heads;
  std::vector<int32_t> cursors(static_cast<size_t>(rows * classes));
  constexpr int64_t kTokensPerTask = 1 << 14;
  torch::stable::parallel_for(
      0, rows, std::max<int64_t>(1, kTokensPerTask / std::max(1, p.tokens)),
      [&](int64_t first, int64_t last) { cpu_counting_sort(p, first, last, cursors.data() + first * classes); });
  return result;
}

#ifdef VDIT_CUDA
Result counting_sort_cuda(const Tensor& labels, int64_t classes) {
  const int32_t device = labels.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Result result;
  const CountingSortParams p = prepare(labels, classes, result);
  const auto bytes = static_cast<int64_t>(counting_sort_workspace_bytes(p));
  // Freed when this function returns, and reused only by later work of the same stream.
  Tensor workspace = torch::stable::new_empty(labels, {bytes}, ScalarType::Byte);
  check_cuda(cuda_counting_sort(p, workspace.mutable_data_ptr(), size_t(bytes), current_cuda_stream(device)),
             "counting_sort");
  return result;
}
#else
Result counting_sort_cuda(const Tensor&, int64_t) { fail_without_cuda("counting_sort"); }
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) { m.impl("counting_sort", TORCH_BOX(&vdit::counting_sort_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("counting_sort", TORCH_BOX(&vdit::counting_sort_cuda)); }

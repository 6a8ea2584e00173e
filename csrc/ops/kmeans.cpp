#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu/kmeans.h"
#include "ops/token_args.h"

namespace vdit {
namespace {

void check_devices(const Tensor& x, const Tensor& centroids) {
  VDIT_CHECK(same_device(x, centroids), "kmeans_assign: centroids is on ", device_text(centroids), " but x is on ",
             device_text(x));
}

// Checks everything, allocates the labels and points the parameters at them.
KmeansParams prepare(const Tensor& x, const Tensor& centroids, Tensor& labels) {
  const DType dtype = kernel_dtype(x, "kmeans_assign: x");
  const TokenRows rows = token_rows(x, "kmeans_assign: x");
  VDIT_CHECK(x.size(3) >= 1 && x.size(3) <= kKmeansMaxDim, "kmeans_assign: x has dim ", x.size(3), "; expected 1 to ",
             kKmeansMaxDim);
  VDIT_CHECK(centroids.scalar_type() == ScalarType::Float, "kmeans_assign: centroids is ",
             dtype_text(centroids.scalar_type()), "; centroids are float32 (they are rounded to x's dtype inside)");
  VDIT_CHECK(centroids.dim() == 4 && centroids.size(0) == x.size(0) && centroids.size(1) == x.size(2) &&
                 centroids.size(3) == x.size(3) && centroids.size(2) >= 1,
             "kmeans_assign: centroids has shape ", shape_text(centroids),
             "; expected [batch, heads, at least 1, dim] = [", x.size(0), ", ", x.size(2), ", C, ", x.size(3), "]");
  VDIT_CHECK(centroids.size(2) < (int64_t{1} << 31) - 4096, "kmeans_assign: centroids has shape ",
             shape_text(centroids), "; sizes must fit 32 bits");
  VDIT_CHECK(centroids.size(3) == 1 || centroids.stride(3) == 1, "kmeans_assign: centroids has stride ",
             centroids.stride(3), " in its last dimension; it must be contiguous there: call .contiguous()");
  check_devices(x, centroids);
  labels = torch::stable::new_empty(x, {x.size(0), x.size(2), x.size(1)}, ScalarType::Int);
  return {rows,
          {centroids.const_data_ptr(), centroids.stride(0), centroids.stride(2), centroids.stride(1)},
          int32_t(x.size(0)),
          int32_t(x.size(1)),
          int32_t(x.size(2)),
          int32_t(x.size(3)),
          int32_t(centroids.size(2)),
          dtype,
          labels.mutable_data_ptr<int32_t>()};
}

Tensor kmeans_assign_cpu(const Tensor& x, const Tensor& centroids) {
  Tensor labels;
  const KmeansParams p = prepare(x, centroids, labels);
  const KmeansKernels& kernels = kmeans_kernels();
  const int64_t width = kernels.panel_width, panels = (p.centres + width - 1) / width,
                heads = int64_t{p.batch} * p.heads;
  const int64_t tiles = (int64_t{p.tokens} + kKmeansTileTokens - 1) / kKmeansTileTokens;
  if (heads * tiles == 0) return labels;
  std::vector<float> values(static_cast<size_t>(heads * panels * width * p.dim));
  std::vector<float> norms(static_cast<size_t>(heads * panels * width));
  const KmeansPanels packed{values.data(), norms.data(), int32_t(width), int32_t(panels)};
  constexpr int64_t kElementsPerTask = 1 << 15;
  torch::stable::parallel_for(0, heads * panels, std::max<int64_t>(1, kElementsPerTask / (width * p.dim)),
                              [&](int64_t first, int64_t last) { kernels.pack(p, packed, first, last); });
  torch::stable::parallel_for(0, heads * tiles, 1,
                              [&](int64_t first, int64_t last) { kernels.assign(p, packed, first, last); });
  return labels;
}

#ifdef VDIT_CUDA
Tensor kmeans_assign_cuda(const Tensor& x, const Tensor& centroids) {
  check_devices(x, centroids);
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  VDIT_CHECK(
      x.scalar_type() != ScalarType::Float,
      "kmeans_assign: x is float32 on a GPU, where only bfloat16 and float16 are multiplied; convert it to one of "
      "them, or move it to the CPU");
  Tensor labels;
  const KmeansParams p = prepare(x, centroids, labels);
  const auto bytes = static_cast<int64_t>(kmeans_workspace_bytes(p));
  // Freed when this function returns, and reused only by later work of the same stream.
  Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  check_cuda(cuda_kmeans_assign(p, workspace.mutable_data_ptr(), size_t(bytes), current_cuda_stream(device)),
             "kmeans_assign");
  return labels;
}
#else
Tensor kmeans_assign_cuda(const Tensor&, const Tensor&) { fail_without_cuda("kmeans_assign"); }
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) { m.impl("kmeans_assign", TORCH_BOX(&vdit::kmeans_assign_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("kmeans_assign", TORCH_BOX(&vdit::kmeans_assign_cuda)); }

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>

#include "cpu/block_mean.h"
#include "ops/token_args.h"

namespace vdit {
namespace {

using Result = std::tuple<Tensor, Tensor>;
using Optional = std::optional<Tensor>;

// Checks everything, allocates the results and points the parameters at them.
BlockMeanParams prepare(const Tensor& x, const Tensor& lengths, const Optional& order, const Optional& kv_len,
                        Result& result) {
  const DType dtype = kernel_dtype(x, "block_mean: x");
  const TokenRows rows = token_rows(x, "block_mean: x");
  const TokenInts counts = token_ints(lengths, "block_mean: lengths", x, -1, true);
  const TokenInts positions = order ? token_ints(*order, "block_mean: order", x, x.size(1), false) : TokenInts{};
  const TokenInts limits = token_limits(kv_len, "block_mean: kv_len", x);
  const int64_t batch = x.size(0), heads = x.size(2), blocks = lengths.size(2);
  result = {torch::stable::new_empty(x, {batch, heads, blocks, x.size(3)}, ScalarType::Float),
            torch::stable::new_empty(x, {batch, heads, blocks}, ScalarType::Int)};
  return {rows,
          counts,
          positions,
          limits,
          int32_t(batch),
          int32_t(x.size(1)),
          int32_t(heads),
          int32_t(x.size(3)),
          int32_t(blocks),
          int32_t(lengths.size(0)),
          int32_t(lengths.size(1)),
          dtype,
          std::get<0>(result).mutable_data_ptr<float>(),
          std::get<1>(result).mutable_data_ptr<int32_t>()};
}

Result block_mean_cpu(const Tensor& x, const Tensor& lengths, const Optional& order, const Optional& kv_len) {
  Result result;
  const BlockMeanParams p = prepare(x, lengths, order, kv_len, result);
  BlockMeanSchedule schedule(p);
  VDIT_CHECK(schedule.error().empty(), "block_mean: ", schedule.error());
  constexpr int64_t kPartsPerTask = 4;
  std::atomic<bool> in_range{true};
  torch::stable::parallel_for(0, schedule.size(), kPartsPerTask, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      if (!cpu_block_mean_part(p, schedule.work(i))) in_range = false;
  });
  VDIT_CHECK(in_range, "block_mean: order has entries outside 0 to ", p.tokens - 1,
             "; it must be a permutation of the tokens");
  schedule.add_parts();
  return result;
}

#ifdef VDIT_CUDA
Result block_mean_cuda(const Tensor& x, const Tensor& lengths, const Optional& order, const Optional& kv_len) {
  Result result;
  const BlockMeanParams p = prepare(x, lengths, order, kv_len, result);
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto bytes = static_cast<int64_t>(block_mean_workspace_bytes(p));
  // Freed when this function returns, and reused only by later work of the same stream.
  Tensor workspace = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  check_cuda(cuda_block_mean(p, workspace.mutable_data_ptr(), size_t(bytes), current_cuda_stream(device)),
             "block_mean");
  return result;
}
#else
Result block_mean_cuda(const Tensor&, const Tensor&, const Optional&, const Optional&) {
  fail_without_cuda("block_mean");
}
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) { m.impl("block_mean", TORCH_BOX(&vdit::block_mean_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("block_mean", TORCH_BOX(&vdit::block_mean_cuda)); }

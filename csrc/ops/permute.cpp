#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>

#include "cpu/permute.h"
#include "ops/token_args.h"

namespace vdit {
namespace {

// Checks everything, allocates the result and points the parameters at it.
PermuteParams prepare(const Tensor& x, const Tensor& order, bool inverse, Tensor& out) {
  const TokenRows rows = token_rows(x, "permute_tokens: x");
  const auto bytes = static_cast<int32_t>(x.element_size());
  VDIT_CHECK(bytes == 2 || bytes == 4, "permute_tokens: x is ", dtype_text(x.scalar_type()), " of ", bytes,
             " bytes; expected a dtype of 2 or 4 bytes");
  const TokenInts positions = token_ints(order, "permute_tokens: order", x, x.size(1), false);
  out = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
  return {rows,  positions,       int32_t(x.size(0)),    int32_t(x.size(1)), int32_t(x.size(2)), int32_t(x.size(3)),
          bytes, inverse ? 1 : 0, out.mutable_data_ptr()};
}

// The inverse writes the rows that the order names: each must be named.
void check_permutation(const PermuteParams& p) {
  if (int64_t{p.batch} * p.heads == 0) return;
  const int64_t batch = p.order.batch_stride == 0 ? 1 : p.batch, heads = p.order.head_stride == 0 ? 1 : p.heads;
  std::atomic<int32_t> repeated{-1};
  constexpr int64_t kTokensPerTask = 1 << 15;
  torch::stable::parallel_for(0, batch * heads, std::max<int64_t>(1, kTokensPerTask / std::max(1, p.tokens)),
                              [&](int64_t first, int64_t last) {
                                for (int64_t i = first; i < last; ++i) {
                                  const int32_t token = cpu_repeated_token(p, i / heads, i % heads);
                                  if (token >= 0) repeated = token;
                                }
                              });
  VDIT_CHECK(repeated < 0, "permute_tokens: order names token ", repeated.load(),
             " twice; its inverse needs a permutation of the tokens");
}

Tensor permute_tokens_cpu(const Tensor& x, const Tensor& order, bool inverse) {
  Tensor out;
  const PermuteParams p = prepare(x, order, inverse, out);
  if (inverse) check_permutation(p);
  constexpr int64_t kBytesPerTask = 1 << 16;
  const int64_t row_bytes = std::max<int64_t>(1, int64_t{p.dim} * p.element_bytes);
  std::atomic<bool> in_range{true};
  torch::stable::parallel_for(0, int64_t{p.batch} * p.tokens * p.heads, std::max<int64_t>(1, kBytesPerTask / row_bytes),
                              [&](int64_t first, int64_t last) {
                                if (!cpu_permute_tokens(p, first, last)) in_range = false;
                              });
  VDIT_CHECK(in_range, "permute_tokens: order has entries outside 0 to ", p.tokens - 1,
             "; it must be a permutation of the tokens");
  return out;
}

#ifdef VDIT_CUDA
Tensor permute_tokens_cuda(const Tensor& x, const Tensor& order, bool inverse) {
  Tensor out;
  const PermuteParams p = prepare(x, order, inverse, out);
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (inverse) torch::stable::zero_(out);  // an order that is no permutation, which nobody reads back, leaves rows out
  check_cuda(cuda_permute_tokens(p, current_cuda_stream(device)), "permute_tokens");
  return out;
}
#else
Tensor permute_tokens_cuda(const Tensor&, const Tensor&, bool) { fail_without_cuda("permute_tokens"); }
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) { m.impl("permute_tokens", TORCH_BOX(&vdit::permute_tokens_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("permute_tokens", TORCH_BOX(&vdit::permute_tokens_cuda)); }

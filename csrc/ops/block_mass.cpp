// score_lse, block_mass and softmax_mass: checks, parameters, dispatch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/block_mass.h"
#include "ops/attention_args.h"
#include "ops/attention_cuda_params.h"
#include "ops/cpu_call.h"
#ifdef VDIT_CUDA
#include "kernels/select/block_mass.h"
#endif

namespace vdit {
namespace {

constexpr int64_t kMaxFold = 1024;  // a tile of folded queries lies in memory at once

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A block of any size, as one that is at most all folded rows of t: what follows adds and multiplies it.
int64_t fitting(int64_t block, const Tensor& t, int64_t fold) {
  return std::min(block, std::max<int64_t>(1, ceil_div(t.size(1), fold)));
}

void check_scores(const char* op, const Tensor& q, const Tensor& k, int64_t fold, const Optional& kv_len) {
  for (auto [t, name] : {std::pair{&q, "q"}, {&k, "k"}}) {
    VDIT_CHECK(t->dim() == 4, op, ": ", name, " has shape ", shape_text(*t), "; expected [batch, tokens, heads, dim]");
  }
  VDIT_CHECK(k.scalar_type() == q.scalar_type(), op, ": k is ", dtype_text(k.scalar_type()), " but q is ",
             dtype_text(q.scalar_type()), "; convert them to one dtype");
  VDIT_CHECK(same_device(k, q), op, ": k is on ", device_text(k), " but q is on ", device_text(q));
  VDIT_CHECK(k.size(0) == q.size(0) && k.size(3) == q.size(3), op, ": k has shape ", shape_text(k), " but q has ",
             shape_text(q), "; batch and head dim must agree");
  VDIT_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0, op, ": ", q.size(2), " query heads are not a multiple of ",
             k.size(2), " key heads");
  VDIT_CHECK(q.size(3) >= 1 && q.size(3) <= kMaxHeadDim, op, ": head dim is ", q.size(3), "; supported are 1 to ",
             kMaxHeadDim);
  const int64_t limit = std::numeric_limits<int32_t>::max() / 4;
  VDIT_CHECK(q.size(1) <= limit && k.size(1) <= limit, op, ": more than ", limit, " tokens in one sequence");
  VDIT_CHECK(fold >= 1 && fold <= kMaxFold, op, ": fold is ", fold, "; expected 1 to ", kMaxFold);
  if (kv_len) check_kv_len(*kv_len, q, op);
}

void check_blocks(const char* op, int64_t q_block, int64_t kv_block) {
  for (auto [block, name] : {std::pair{q_block, "q_block"}, {kv_block, "kv_block"}})
    VDIT_CHECK(block >= 1, op, ": ", name, " is ", block, "; expected at least 1");
}

void check_mass(const Tensor& q, const Tensor& lse, int64_t q_block, int64_t kv_block, int64_t fold) {
  const int64_t queries = ceil_div(q.size(1), fold);
  VDIT_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && same_device(lse, q) && lse.dim() == 3 &&
                 lse.size(0) == q.size(0) && lse.size(1) == q.size(2) && lse.size(2) == queries,
             "block_mass: lse is ", dtype_text(lse.scalar_type()), " ", shape_text(lse), " on ", device_text(lse),
             "; expected contiguous float32 [batch, heads, ceil(queries / fold)] = [", q.size(0), ", ", q.size(2), ", ",
             queries, "] on ", device_text(q));
  check_blocks("block_mass", q_block, kv_block);
}

ScoreParams cpu_scores(const char* op, const Tensor& q, const Tensor& k, double scale, int64_t fold,
                       const Optional& kv_len, std::vector<int64_t>* lengths) {
  const std::string name = op;
  ScoreParams p;
  p.q = view_of(q, name + ": q");
  p.k = view_of(k, name + ": k");
  p.scale = checked_scale(scale, op);
  p.fold = fold;
  if (kv_len) {
    *lengths = lengths_of(*kv_len, k.size(1), op);
    p.kv_len = lengths->data();
  }
  return p;
}

Tensor new_lse(const Tensor& q, int64_t fold) {
  return torch::stable::new_empty(q, {q.size(0), q.size(2), ceil_div(q.size(1), fold)}, ScalarType::Float);
}

Tensor score_lse_cpu_op(const Tensor& q, const Tensor& k, double scale, int64_t fold, const Optional& kv_len) {
  check_scores("score_lse", q, k, fold, kv_len);
  std::vector<int64_t> lengths;
  const ScoreParams p = cpu_scores("score_lse", q, k, scale, fold, kv_len, &lengths);
  Tensor lse = new_lse(q, fold);
  score_lse_cpu(p, lse.mutable_data_ptr<float>(), parallel_for_each);
  return lse;
}

Tensor new_mass(const Tensor& q, const Tensor& k, int64_t q_block, int64_t kv_block, int64_t fold) {
  return torch::stable::new_empty(q,
                                  {q.size(0), q.size(2), ceil_div(ceil_div(q.size(1), fold), q_block),
                                   ceil_div(ceil_div(k.size(1), fold), kv_block)},
                                  ScalarType::Float);
}

Tensor block_mass_cpu_op(const Tensor& q, const Tensor& k, const Tensor& lse, int64_t q_block, int64_t kv_block,
                         double scale, int64_t fold, const Optional& kv_len) {
  check_scores("block_mass", q, k, fold, kv_len);
  check_mass(q, lse, q_block, kv_block, fold);
  q_block = fitting(q_block, q, fold);
  kv_block = fitting(kv_block, k, fold);
  std::vector<int64_t> lengths;
  const BlockMassParams p{cpu_scores("block_mass", q, k, scale, fold, kv_len, &lengths), lse.const_data_ptr<float>(),
                          q_block, kv_block};
  Tensor mass = new_mass(q, k, q_block, kv_block, fold);
  block_mass_cpu(p, mass.mutable_data_ptr<float>(), parallel_for_each);
  return mass;
}

void check_softmax_mass(const Tensor& q, const Tensor& k, int64_t q_block, int64_t kv_block, int64_t fold,
                        const Optional& q_len, const Optional& kv_len) {
  check_scores("softmax_mass", q, k, fold, kv_len);
  check_blocks("softmax_mass", q_block, kv_block);
  if (q_len) check_kv_len(*q_len, q, "softmax_mass", "q_len");
}

Tensor softmax_mass_cpu_op(const Tensor& q, const Tensor& k, int64_t q_block, int64_t kv_block, double scale,
                           int64_t fold, const Optional& q_len, const Optional& kv_len) {
  check_softmax_mass(q, k, q_block, kv_block, fold, q_len, kv_len);
  q_block = fitting(q_block, q, fold);
  kv_block = fitting(kv_block, k, fold);
  std::vector<int64_t> q_lengths, lengths;
  BlockMassParams p{cpu_scores("softmax_mass", q, k, scale, fold, kv_len, &lengths), nullptr, q_block, kv_block};
  if (q_len) {
    q_lengths = lengths_of(*q_len, q.size(1), "softmax_mass", "q_len");
    p.scores.q_len = q_lengths.data();
  }
  Tensor mass = new_mass(q, k, q_block, kv_block, fold);
  softmax_mass_cpu(p, mass.mutable_data_ptr<float>(), parallel_for_each);
  return mass;
}

#ifdef VDIT_CUDA

gpu::Lengths lengths_on_device(const Tensor& t) {
  return {t.const_data_ptr(), t.scalar_type() == ScalarType::Long ? 8 : 4};
}

gpu::ScoreParams cuda_scores(const char* op, const Tensor& q, const Tensor& k, double scale, int64_t fold,
                             const Optional& kv_len) {
  VDIT_CHECK(q.scalar_type() == ScalarType::BFloat16 || q.scalar_type() == ScalarType::Half, op, ": q is ",
             dtype_text(q.scalar_type()),
             "; the CUDA kernels take bfloat16 and float16: convert q and k, or call vdit_fast.reference.", op);
  VDIT_CHECK(q.size(3) % 8 == 0, op, ": head dim is ", q.size(3),
             "; on CUDA it must be a multiple of 8: pad q and k with zeros and keep the scale");
  const int64_t limit = std::numeric_limits<int32_t>::max();
  VDIT_CHECK(q.size(0) <= limit && q.size(2) <= limit, op, ": q has shape ", shape_text(q), "; at most ", limit,
             " batch items and heads");
  gpu::ScoreParams p{};
  p.q = rows_of(q, "q", op);
  p.k = rows_of(k, "k", op);
  p.batch = int32_t(q.size(0));
  p.heads = int32_t(q.size(2));
  p.kv_heads = int32_t(k.size(2));
  p.dim = int32_t(q.size(3));
  p.lq = int32_t(q.size(1));
  p.lk = int32_t(k.size(1));
  p.fold = int32_t(fold);
  p.dtype = kernel_dtype(q, std::string(op) + ": q");
  p.scale = checked_scale(scale, op);
  if (kv_len) p.kv_len = lengths_on_device(*kv_len);
  return p;
}

Tensor score_lse_cuda(const Tensor& q, const Tensor& k, double scale, int64_t fold, const Optional& kv_len) {
  check_scores("score_lse", q, k, fold, kv_len);
  const gpu::ScoreParams p = cuda_scores("score_lse", q, k, scale, fold, kv_len);
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  options_for(device, "score_lse");
  Tensor lse = new_lse(q, fold);
  check_cuda(gpu::score_lse(p, lse.mutable_data_ptr<float>(), current_cuda_stream(device)), "score_lse");
  return lse;
}

Tensor block_mass_cuda(const Tensor& q, const Tensor& k, const Tensor& lse, int64_t q_block, int64_t kv_block,
                       double scale, int64_t fold, const Optional& kv_len) {
  check_scores("block_mass", q, k, fold, kv_len);
  check_mass(q, lse, q_block, kv_block, fold);
  q_block = fitting(q_block, q, fold);
  kv_block = fitting(kv_block, k, fold);
  const gpu::ScoreParams p = cuda_scores("block_mass", q, k, scale, fold, kv_len);
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  options_for(device, "block_mass");
  Tensor mass = new_mass(q, k, q_block, kv_block, fold);
  check_cuda(gpu::block_mass(p, lse.const_data_ptr<float>(), q_block, kv_block, mass.mutable_data_ptr<float>(),
                             current_cuda_stream(device)),
             "block_mass");
  return mass;
}

Tensor softmax_mass_cuda(const Tensor& q, const Tensor& k, int64_t q_block, int64_t kv_block, double scale,
                         int64_t fold, const Optional& q_len, const Optional& kv_len) {
  check_softmax_mass(q, k, q_block, kv_block, fold, q_len, kv_len);
  q_block = fitting(q_block, q, fold);
  kv_block = fitting(kv_block, k, fold);
  gpu::ScoreParams p = cuda_scores("softmax_mass", q, k, scale, fold, kv_len);
  if (q_len) p.q_len = lengths_on_device(*q_len);
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  options_for(device, "softmax_mass");
  Tensor lse = new_lse(q, fold), mass = new_mass(q, k, q_block, kv_block, fold);
  check_cuda(gpu::softmax_mass(p, q_block, kv_block, lse.mutable_data_ptr<float>(), mass.mutable_data_ptr<float>(),
                               current_cuda_stream(device)),
             "softmax_mass");
  return mass;
}

#else

Tensor score_lse_cuda(const Tensor&, const Tensor&, double, int64_t, const Optional&) {
  fail_without_cuda("score_lse");
}

Tensor block_mass_cuda(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, double, int64_t,
                       const Optional&) {
  fail_without_cuda("block_mass");
}

Tensor softmax_mass_cuda(const Tensor&, const Tensor&, int64_t, int64_t, double, int64_t, const Optional&,
                         const Optional&) {
  fail_without_cuda("softmax_mass");
}

#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) {
  m.impl("block_mass", TORCH_BOX(&vdit::block_mass_cpu_op));
  m.impl("score_lse", TORCH_BOX(&vdit::score_lse_cpu_op));
  m.impl("softmax_mass", TORCH_BOX(&vdit::softmax_mass_cpu_op));
}

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) {
  m.impl("block_mass", TORCH_BOX(&vdit::block_mass_cuda));
  m.impl("score_lse", TORCH_BOX(&vdit::score_lse_cuda));
  m.impl("softmax_mass", TORCH_BOX(&vdit::softmax_mass_cuda));
}

// attention and attention_backward on the CPU.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/attention_plan.h"
#include "ops/attention_args.h"
#include "ops/cpu_call.h"

namespace vdit {
namespace {

OrderView order_of(const Optional& t, const char* name, const Tensor& q) {
  OrderView o;
  if (!t) return o;
  check_order(*t, name, q);
  o.data = t->const_data_ptr<int32_t>();
  o.batch = t->size(0);
  o.heads = t->size(1);
  o.n = t->size(2);
  return o;
}

// Everything an operator was called with, checked, as the kernels want it.
struct Call {
  AttentionParams params;
  std::optional<DensePlan> dense;
  std::optional<CoveredPlan> covered;
  std::vector<int64_t> kv_len;

  Call(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& tiles, const Optional& run_ptr,
       const Optional& runs, const Optional& mask_bits, const Optional& q_order, const Optional& kv_order,
       int64_t plan_batch, int64_t plan_heads, double scale, const Optional& row_scale, const Optional& lengths,
       const Tensors& segment_k, const Tensors& segment_v) {
    check_qkv(q, k, v);
    params.q = view_of(q, "attention: q");
    params.k = view_of(k, "attention: k");
    params.v = view_of(v, "attention: v");
    params.scale = checked_scale(scale);
    set_plan(q, k, tiles, run_ptr, runs, mask_bits, q_order, kv_order, plan_batch, plan_heads);
    if (row_scale) {
      check_rows(*row_scale, "row_scale", q);
      params.row_scale = row_scale->const_data_ptr<float>();
    }
    if (lengths) set_kv_len(*lengths, q, k);
    check_segments(segment_k, segment_v, q, k);
    for (size_t i = 0; i < segment_k.size(); ++i)
      params.segments.push_back(
          {view_of(segment_k[i], "attention: segment k"), view_of(segment_v[i], "attention: segment v")});
    if (!params.segments.empty()) {
      covered.emplace(params.plan, q.size(1));
      params.plan.num_tiles = static_cast<int64_t>(covered->run_ptr.size()) - 1;
      params.plan.tiles = covered->tiles.data();
      params.plan.run_ptr = covered->run_ptr.data();
    }
  }
  Call(const Call&) = delete;  // params points into the other members

  void set_plan(const Tensor& q, const Tensor& k, const Optional& tiles, const Optional& run_ptr, const Optional& runs,
                const Optional& mask_bits, const Optional& q_order, const Optional& kv_order, int64_t plan_batch,
                int64_t plan_heads) {
    const bool given = check_plan_lists(q, tiles, run_ptr, runs, mask_bits, q_order, kv_order);
    if (!given || !tiles || !run_ptr || !runs) {
      dense.emplace(q.size(1), k.size(1));
      params.plan = dense->view();
      return;
    }
    PlanView& plan = params.plan;
    plan.batch = plan_batch;
    plan.heads = plan_heads;
    plan.num_tiles = tiles->size(0);
    plan.tiles = tiles->const_data_ptr<int32_t>();
    plan.run_ptr = run_ptr->const_data_ptr<int32_t>();
    plan.runs = runs->const_data_ptr<int32_t>();
    if (mask_bits) plan.mask_bits = mask_bits->const_data_ptr<int32_t>();
    plan.q_order = order_of(q_order, "q_order", q);
    plan.kv_order = order_of(kv_order, "kv_order", q);
    const std::string error =
        check_plan(plan, q.size(0), q.size(2), q.size(1), k.size(1), runs->size(0), mask_bits ? mask_bits->size(0) : 0);
    VDIT_CHECK(error.empty(), "attention: ", error);
  }

  void set_kv_len(const Tensor& t, const Tensor& q, const Tensor& k) {
    check_kv_len(t, q);
    kv_len = lengths_of(t, k.size(1), "attention");
    params.kv_len = kv_len.data();
  }
};

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& tiles,
                                         const Optional& run_ptr, const Optional& runs, const Optional& mask_bits,
                                         const Optional& q_order, const Optional& kv_order, int64_t plan_batch,
                                         int64_t plan_heads, double scale, const Optional& row_scale,
                                         const Optional& kv_len, const Tensors& segment_k, const Tensors& segment_v) {
  const Call call(q, k, v, tiles, run_ptr, runs, mask_bits, q_order, kv_order, plan_batch, plan_heads, scale, row_scale,
                  kv_len, segment_k, segment_v);
  // Rows that no tile owns are empty rows.
  Tensor out = torch::stable::new_zeros(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  torch::stable::fill_(lse, -std::numeric_limits<double>::infinity());
  attention_forward_cpu(call.params, {view_of(out, "out"), lse.mutable_data_ptr<float>()}, parallel_for_each);
  return {out, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors>;

Gradients attention_backward_cpu_op(const Tensor& dout, const Optional& dlse, const Tensor& out, const Tensor& lse,
                                    const Tensor& q, const Tensor& k, const Tensor& v, const Optional& tiles,
                                    const Optional& run_ptr, const Optional& runs, const Optional& mask_bits,
                                    const Optional& q_order, const Optional& kv_order, int64_t plan_batch,
                                    int64_t plan_heads, double scale, const Optional& row_scale, const Optional& kv_len,
                                    const Tensors& segment_k, const Tensors& segment_v) {
  const Call call(q, k, v, tiles, run_ptr, runs, mask_bits, q_order, kv_order, plan_batch, plan_heads, scale, row_scale,
                  kv_len, segment_k, segment_v);
  check_backward(dout, dlse, out, lse, q);

  BackwardInputs in{view_of(dout, "dout"), view_of(out, "out"), lse.const_data_ptr<float>(),
                    dlse ? dlse->const_data_ptr<float>() : nullptr};
  auto zeros = [&](const Tensor& like, std::optional<ScalarType> dtype) {
    return torch::stable::new_zeros(like, {like.size(0), like.size(1), like.size(2), like.size(3)}, dtype);
  };
  Tensor dq = zeros(q, std::nullopt), dk = zeros(k, ScalarType::Float), dv = zeros(v, ScalarType::Float);
  BackwardOutputs grads{view_of(dq, "dq"), view_of(dk, "dk"), view_of(dv, "dv"), {}};
  Tensors dsk, dsv;
  for (size_t i = 0; i < segment_k.size(); ++i) {
    dsk.push_back(zeros(segment_k[i], ScalarType::Float));
    dsv.push_back(zeros(segment_v[i], ScalarType::Float));
    grads.segments.push_back({view_of(dsk.back(), "dk"), view_of(dsv.back(), "dv")});
  }
  attention_backward_cpu(call.params, in, grads, parallel_for_each);
  auto narrow = [&](const Tensor& t) {
    return q.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, q.scalar_type());
  };
  for (auto* list : {&dsk, &dsv})
    for (Tensor& t : *list) t = narrow(t);
  return {dq, narrow(dk), narrow(dv), dsk, dsv};
}

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) {
  m.impl("attention", TORCH_BOX(&vdit::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&vdit::attention_backward_cpu_op));
}

// attention and attention_backward: argument checks, parameters, device dispatch.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <limits>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/attention.h"
#include "cpu/attention_plan.h"
#include "ops/common.h"

namespace vdit {
namespace {

using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

constexpr int64_t kMaxHeadDim = 256;

View4 view_of(const Tensor& t, const std::string& what) {
  View4 v;
  v.data = const_cast<void*>(t.const_data_ptr());
  v.dtype = kernel_dtype(t, what);
  for (int i = 0; i < 4; ++i) {
    v.size[i] = t.size(i);
    v.stride[i] = t.stride(i);
  }
  return v;
}

void check_int_list(const Tensor& t, const char* name, int64_t columns, const Tensor& q) {
  VDIT_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && same_device(t, q), "attention: plan.", name,
             " must be a contiguous int32 tensor on ", device_text(q), ", got ", dtype_text(t.scalar_type()), " on ",
             device_text(t), "; move the plan with plan.to(device)");
  VDIT_CHECK(columns == 0 ? t.dim() == 1 : t.dim() == 2 && t.size(1) == columns, "attention: plan.", name,
             " has shape ", shape_text(t), ", expected [n", columns == 0 ? "]" : ", " + std::to_string(columns) + "]");
}

OrderView order_of(const Optional& t, const char* name, const Tensor& q) {
  OrderView o;
  if (!t) return o;
  VDIT_CHECK(t->scalar_type() == ScalarType::Int && t->is_contiguous() && same_device(*t, q) && t->dim() == 3,
             "attention: plan.", name, " must be a contiguous int32 tensor [batch or 1, heads or 1, length] on ",
             device_text(q), ", got ", dtype_text(t->scalar_type()), " ", shape_text(*t), " on ", device_text(*t));
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
    params.scale = static_cast<float>(scale);
    VDIT_CHECK(params.scale - params.scale == 0.f, "attention: scale is ", scale, "; expected a finite number");
    set_plan(q, k, tiles, run_ptr, runs, mask_bits, q_order, kv_order, plan_batch, plan_heads);
    if (row_scale) {
      check_rows(*row_scale, "row_scale", q);
      params.row_scale = row_scale->const_data_ptr<float>();
    }
    if (lengths) set_kv_len(*lengths, q, k);
    VDIT_CHECK(segment_k.size() == segment_v.size(), "attention: segments have ", segment_k.size(), " keys but ",
               segment_v.size(), " values");
    for (size_t i = 0; i < segment_k.size(); ++i) add_segment(segment_k[i], segment_v[i], i, q, k);
    if (!params.segments.empty()) {
      covered.emplace(params.plan, q.size(1));
      params.plan.num_tiles = static_cast<int64_t>(covered->run_ptr.size()) - 1;
      params.plan.tiles = covered->tiles.data();
      params.plan.run_ptr = covered->run_ptr.data();
    }
  }
  Call(const Call&) = delete;  // params points into the other members

  static void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
    for (auto [t, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
      VDIT_CHECK(t->dim() == 4, "attention: ", name, " has shape ", shape_text(*t),
                 "; expected [batch, tokens, heads, dim]");
      VDIT_CHECK(t->scalar_type() == q.scalar_type(), "attention: ", name, " is ", dtype_text(t->scalar_type()),
                 " but q is ", dtype_text(q.scalar_type()), "; convert them to one dtype");
      VDIT_CHECK(same_device(*t, q), "attention: ", name, " is on ", device_text(*t), " but q is on ", device_text(q));
      VDIT_CHECK(t->size(0) == q.size(0) && t->size(3) == q.size(3), "attention: ", name, " has shape ", shape_text(*t),
                 " but q has ", shape_text(q), "; batch and head dim must agree");
    }
    VDIT_CHECK(k.size(1) == v.size(1) && k.size(2) == v.size(2), "attention: k has shape ", shape_text(k),
               " but v has ", shape_text(v));
    VDIT_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "attention: ", q.size(2),
               " query heads are not a multiple of ", k.size(2), " key/value heads");
    VDIT_CHECK(q.size(3) >= 1 && q.size(3) <= kMaxHeadDim, "attention: head dim is ", q.size(3),
               "; supported are 1 to ", kMaxHeadDim);
    const int64_t limit = std::numeric_limits<int32_t>::max() / 4;
    VDIT_CHECK(q.size(1) <= limit && k.size(1) <= limit, "attention: more than ", limit, " tokens in one sequence");
  }

  static void check_rows(const Tensor& t, const char* name, const Tensor& q) {
    VDIT_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && same_device(t, q) && t.dim() == 3 &&
                   t.size(0) == q.size(0) && t.size(1) == q.size(2) && t.size(2) == q.size(1),
               "attention: ", name, " is ", dtype_text(t.scalar_type()), " ", shape_text(t), " on ", device_text(t),
               "; expected contiguous float32 [batch, heads, queries] = [", q.size(0), ", ", q.size(2), ", ", q.size(1),
               "] on ", device_text(q));
  }

  void set_plan(const Tensor& q, const Tensor& k, const Optional& tiles, const Optional& run_ptr, const Optional& runs,
                const Optional& mask_bits, const Optional& q_order, const Optional& kv_order, int64_t plan_batch,
                int64_t plan_heads) {
    if (!tiles) {
      VDIT_CHECK(!run_ptr && !runs && !mask_bits && !q_order && !kv_order, "attention: a plan without tiles");
      dense.emplace(q.size(1), k.size(1));
      params.plan = dense->view();
      return;
    }
    VDIT_CHECK(run_ptr && runs, "attention: a plan needs tiles, run_ptr and runs");
    check_int_list(*tiles, "tiles", 3, q);
    check_int_list(*run_ptr, "run_ptr", 0, q);
    check_int_list(*runs, "runs", 3, q);
    VDIT_CHECK(run_ptr->size(0) == tiles->size(0) + 1, "attention: plan.run_ptr has ", run_ptr->size(0),
               " entries for ", tiles->size(0), " tiles; expected one more than tiles");
    PlanView& plan = params.plan;
    plan.batch = plan_batch;
    plan.heads = plan_heads;
    plan.num_tiles = tiles->size(0);
    plan.tiles = tiles->const_data_ptr<int32_t>();
    plan.run_ptr = run_ptr->const_data_ptr<int32_t>();
    plan.runs = runs->const_data_ptr<int32_t>();
    if (mask_bits) {
      check_int_list(*mask_bits, "mask_bits", 0, q);
      plan.mask_bits = mask_bits->const_data_ptr<int32_t>();
    }
    plan.q_order = order_of(q_order, "q_order", q);
    plan.kv_order = order_of(kv_order, "kv_order", q);
    const std::string error =
        check_plan(plan, q.size(0), q.size(2), q.size(1), k.size(1), runs->size(0), mask_bits ? mask_bits->size(0) : 0);
    VDIT_CHECK(error.empty(), "attention: ", error);
  }

  void set_kv_len(const Tensor& t, const Tensor& q, const Tensor& k) {
    const bool wide = t.scalar_type() == ScalarType::Long;
    VDIT_CHECK((wide || t.scalar_type() == ScalarType::Int) && t.dim() == 1 && t.size(0) == q.size(0) &&
                   t.is_contiguous() && same_device(t, q),
               "attention: kv_len is ", dtype_text(t.scalar_type()), " ", shape_text(t), " on ", device_text(t),
               "; expected contiguous int32 or int64 [", q.size(0), "] on ", device_text(q));
    for (int64_t b = 0; b < q.size(0); ++b) {
      const int64_t n = wide ? t.const_data_ptr<int64_t>()[b] : t.const_data_ptr<int32_t>()[b];
      VDIT_CHECK(n >= 0 && n <= k.size(1), "attention: kv_len[", b, "] is ", n, "; expected 0 to ", k.size(1));
      kv_len.push_back(n);
    }
    params.kv_len = kv_len.data();
  }

  void add_segment(const Tensor& sk, const Tensor& sv, size_t i, const Tensor& q, const Tensor& k) {
    for (auto [t, name] : {std::pair{&sk, "k"}, {&sv, "v"}}) {
      VDIT_CHECK(t->dim() == 4 && t->scalar_type() == q.scalar_type() && same_device(*t, q) &&
                     (t->size(0) == 1 || t->size(0) == q.size(0)) && t->size(1) == sk.size(1) &&
                     t->size(0) == sk.size(0) && t->size(2) == k.size(2) && t->size(3) == q.size(3),
                 "attention: segments[", i, "].", name, " is ", dtype_text(t->scalar_type()), " ", shape_text(*t),
                 " on ", device_text(*t), "; expected ", dtype_text(q.scalar_type()), " [1 or ", q.size(0),
                 ", tokens, ", k.size(2), ", ", q.size(3), "] on ", device_text(q));
    }
    params.segments.push_back({view_of(sk, "attention: segment k"), view_of(sv, "attention: segment v")});
  }
};

// Indices are drawn one at a time, so that long and short items balance themselves.
void parallel_for_each(int64_t n, const std::function<void(int64_t)>& fn) {
  if (n <= 0) return;
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(n, torch::stable::get_num_threads());
  std::exception_ptr error;  // out of memory in a work item: reported after all workers have stopped
  std::mutex guard;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t i = next++; i < n; i = next++) fn(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
      next = n;
    }
  });
  if (error) std::rethrow_exception(error);
}

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
  for (auto [t, name] : {std::pair{&dout, "dout"}, {&out, "out"}}) {
    bool same = t->dim() == 4 && t->scalar_type() == q.scalar_type() && same_device(*t, q);
    for (int i = 0; same && i < 4; ++i) same = t->size(i) == q.size(i);
    VDIT_CHECK(same, "attention_backward: ", name, " is ", dtype_text(t->scalar_type()), " ", shape_text(*t),
               "; expected the dtype and shape of q, ", dtype_text(q.scalar_type()), " ", shape_text(q));
  }
  Call::check_rows(lse, "lse", q);
  if (dlse) Call::check_rows(*dlse, "dlse", q);

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

constexpr const char* kNoCuda =
    "there is no CUDA kernel for attention in this version; move the tensors to the CPU, or call "
    "vdit_fast.reference.attention";

std::tuple<Tensor, Tensor> attention_cuda(const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&,
                                          const Optional&, const Optional&, const Optional&, const Optional&, int64_t,
                                          int64_t, double, const Optional&, const Optional&, const Tensors&,
                                          const Tensors&) {
  fail("attention: ", kNoCuda);
}

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) {
  m.impl("attention", TORCH_BOX(&vdit::attention_cpu));
  m.impl("attention_backward", TORCH_BOX(&vdit::attention_backward_cpu_op));
}
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("attention", TORCH_BOX(&vdit::attention_cuda)); }

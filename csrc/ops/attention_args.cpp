#include "ops/attention_args.h"

#include <limits>
#include <utility>

namespace vdit {

void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v) {
  for (auto [t, name] : {std::pair{&q, "q"}, {&k, "k"}, {&v, "v"}}) {
    VDIT_CHECK(t->dim() == 4, "attention: ", name, " has shape ", shape_text(*t),
               "; expected [batch, tokens, heads, dim]");
    VDIT_CHECK(t->scalar_type() == q.scalar_type(), "attention: ", name, " is ", dtype_text(t->scalar_type()),
               " but q is ", dtype_text(q.scalar_type()), "; convert them to one dtype");
    VDIT_CHECK(same_device(*t, q), "attention: ", name, " is on ", device_text(*t), " but q is on ", device_text(q));
    VDIT_CHECK(t->size(0) == q.size(0) && t->size(3) == q.size(3), "attention: ", name, " has shape ", shape_text(*t),
               " but q has ", shape_text(q), "; batch and head dim must agree");
  }
  VDIT_CHECK(k.size(1) == v.size(1) && k.size(2) == v.size(2), "attention: k has shape ", shape_text(k), " but v has ",
             shape_text(v));
  VDIT_CHECK(k.size(2) > 0 && q.size(2) % k.size(2) == 0, "attention: ", q.size(2),
             " query heads are not a multiple of ", k.size(2), " key/value heads");
  VDIT_CHECK(q.size(3) >= 1 && q.size(3) <= kMaxHeadDim, "attention: head dim is ", q.size(3), "; supported are 1 to ",
             kMaxHeadDim);
  const int64_t limit = std::numeric_limits<int32_t>::max() / 4;
  VDIT_CHECK(q.size(1) <= limit && k.size(1) <= limit, "attention: more than ", limit, " tokens in one sequence");
}

float checked_scale(double scale, const char* op) {
  const auto narrow = static_cast<float>(scale);
  VDIT_CHECK(narrow - narrow == 0.f, op, ": scale is ", scale, "; expected a finite number");
  return narrow;
}

void check_rows(const Tensor& t, const char* name, const Tensor& q) {
  VDIT_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && same_device(t, q) && t.dim() == 3 &&
                 t.size(0) == q.size(0) && t.size(1) == q.size(2) && t.size(2) == q.size(1),
             "attention: ", name, " is ", dtype_text(t.scalar_type()), " ", shape_text(t), " on ", device_text(t),
             "; expected contiguous float32 [batch, heads, queries] = [", q.size(0), ", ", q.size(2), ", ", q.size(1),
             "] on ", device_text(q));
}

void check_int_list(const Tensor& t, const char* name, int64_t columns, const Tensor& q) {
  VDIT_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && same_device(t, q), "attention: plan.", name,
             " must be a contiguous int32 tensor on ", device_text(q), ", got ", dtype_text(t.scalar_type()), " on ",
             device_text(t), "; move the plan with plan.to(device)");
  VDIT_CHECK(columns == 0 ? t.dim() == 1 : t.dim() == 2 && t.size(1) == columns, "attention: plan.", name,
             " has shape ", shape_text(t), ", expected [n", columns == 0 ? "]" : ", " + std::to_string(columns) + "]");
}

bool check_plan_lists(const Tensor& q, const Optional& tiles, const Optional& run_ptr, const Optional& runs,
                      const Optional& mask_bits, const Optional& q_order, const Optional& kv_order) {
  if (!tiles) {
    VDIT_CHECK(!run_ptr && !runs && !mask_bits && !q_order && !kv_order, "attention: a plan without tiles");
    return false;
  }
  VDIT_CHECK(run_ptr && runs, "attention: a plan needs tiles, run_ptr and runs");
  check_int_list(*tiles, "tiles", 3, q);
  check_int_list(*run_ptr, "run_ptr", 0, q);
  check_int_list(*runs, "runs", 3, q);
  VDIT_CHECK(run_ptr->size(0) == tiles->size(0) + 1, "attention: plan.run_ptr has ", run_ptr->size(0), " entries for ",
             tiles->size(0), " tiles; expected one more than tiles");
  if (mask_bits) check_int_list(*mask_bits, "mask_bits", 0, q);
  return true;
}

void check_order(const Tensor& t, const char* name, const Tensor& q) {
  VDIT_CHECK(t.scalar_type() == ScalarType::Int && t.is_contiguous() && same_device(t, q) && t.dim() == 3,
             "attention: plan.", name, " must be a contiguous int32 tensor [batch or 1, heads or 1, length] on ",
             device_text(q), ", got ", dtype_text(t.scalar_type()), " ", shape_text(t), " on ", device_text(t));
}

bool check_kv_len(const Tensor& t, const Tensor& q, const char* op, const char* name) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  VDIT_CHECK((wide || t.scalar_type() == ScalarType::Int) && t.dim() == 1 && t.size(0) == q.size(0) &&
                 t.is_contiguous() && same_device(t, q),
             op, ": ", name, " is ", dtype_text(t.scalar_type()), " ", shape_text(t), " on ", device_text(t),
             "; expected contiguous int32 or int64 [", q.size(0), "] on ", device_text(q));
  return wide;
}

void check_segments(const Tensors& segment_k, const Tensors& segment_v, const Tensor& q, const Tensor& k) {
  VDIT_CHECK(segment_k.size() == segment_v.size(), "attention: segments have ", segment_k.size(), " keys but ",
             segment_v.size(), " values");
  for (size_t i = 0; i < segment_k.size(); ++i) {
    const Tensor &sk = segment_k[i], &sv = segment_v[i];
    for (auto [t, name] : {std::pair{&sk, "k"}, {&sv, "v"}}) {
      VDIT_CHECK(t->dim() == 4 && t->scalar_type() == q.scalar_type() && same_device(*t, q) &&
                     (t->size(0) == 1 || t->size(0) == q.size(0)) && t->size(1) == sk.size(1) &&
                     t->size(0) == sk.size(0) && t->size(2) == k.size(2) && t->size(3) == q.size(3),
                 "attention: segments[", i, "].", name, " is ", dtype_text(t->scalar_type()), " ", shape_text(*t),
                 " on ", device_text(*t), "; expected ", dtype_text(q.scalar_type()), " [1 or ", q.size(0),
                 ", tokens, ", k.size(2), ", ", q.size(3), "] on ", device_text(q));
    }
  }
}

void check_backward(const Tensor& dout, const Optional& dlse, const Tensor& out, const Tensor& lse, const Tensor& q) {
  for (auto [t, name] : {std::pair{&dout, "dout"}, {&out, "out"}}) {
    bool same = t->dim() == 4 && t->scalar_type() == q.scalar_type() && same_device(*t, q);
    for (int i = 0; same && i < 4; ++i) same = t->size(i) == q.size(i);
    VDIT_CHECK(same, "attention_backward: ", name, " is ", dtype_text(t->scalar_type()), " ", shape_text(*t),
               "; expected the dtype and shape of q, ", dtype_text(q.scalar_type()), " ", shape_text(q));
  }
  check_rows(lse, "lse", q);
  if (dlse) check_rows(*dlse, "dlse", q);
}

}  // namespace vdit

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "cpu/qk_norm_rope.h"
#include "ops/token_args.h"

namespace vdit {
namespace {

using Maybe = std::optional<Tensor>;

std::string argument(const std::string& name) { return "qk_norm_rope: " + name; }

// One of q, k, v with all that belongs to it; `name` is its letter.
struct Source {
  std::string name;
  Tensor x;
  Maybe weight, bias, cos, sin, positions, rows, out;
  const char* rows_name;
  int64_t start;
};

// A vector of the norm's parameters.
const void* affine(const QkNormRopeParams& p, const Source& s, const Maybe& t, const char* what, DType& dtype) {
  if (!t) return nullptr;
  const std::string name = argument(s.name + "_" + what);
  VDIT_CHECK(p.norm != QkNorm::none, name, " is given, but norm is \"none\"; leave it out or name the norm");
  const int64_t width = p.norm == QkNorm::rms_across ? s.x.size(2) * p.dim : int64_t{p.dim};
  VDIT_CHECK(t->dim() == 1 && t->size(0) == width, name, " has shape ", shape_text(*t), "; expected [", width, "]",
             p.norm == QkNorm::rms_across ? ", heads * dim" : ", the head dim");
  VDIT_CHECK(width <= 1 || t->stride(0) == 1, name, " is not contiguous: call .contiguous()");
  VDIT_CHECK(same_device(*t, s.x), name, " is on ", device_text(*t), " but ", s.name, " is on ", device_text(s.x));
  dtype = kernel_dtype(*t, name);
  VDIT_CHECK(p.rounding == QkRounding::fast || dtype == DType::f32 || dtype == p.dtype, name, " is ",
             dtype_text(t->scalar_type()), " but ", s.name, " is ", dtype_text(s.x.scalar_type()),
             "; eager rounding is defined for weights in float32 or in the dtype of ", s.name);
  return t->const_data_ptr();
}

RopeTable rope_table(const QkNormRopeParams& p, const Source& s) {
  RopeTable rope{};
  VDIT_CHECK(s.cos.has_value() == s.sin.has_value(), argument(s.name), "_cos and ", s.name, "_sin come together");
  if (!s.cos || p.rotary == 0) return rope;
  const Tensor &cos = *s.cos, &sin = *s.sin;
  const int64_t batch = s.x.size(0), heads = s.x.size(2);
  for (const Tensor* t : {&cos, &sin}) {
    const std::string name = argument(s.name + (t == &cos ? "_cos" : "_sin"));
    VDIT_CHECK(t->dim() == 4 && (t->size(0) == 1 || t->size(0) == batch) && (t->size(2) == 1 || t->size(2) == heads) &&
                   (t->size(3) == p.rotary || t->size(3) == p.rotary / 2),
               name, " has shape ", shape_text(*t), "; expected [1 or ", batch, ", rows, 1 or ", heads, ", ", p.rotary,
               " or ", p.rotary / 2, "]: ", p.rotary, " channels are rotated");
    VDIT_CHECK(t->stride(3) == 1 || t->size(3) <= 1, name, " has stride ", t->stride(3),
               " in its last dimension; it must be contiguous there: call .contiguous()");
    VDIT_CHECK(same_device(*t, s.x), name, " is on ", device_text(*t), " but ", s.name, " is on ", device_text(s.x));
    VDIT_CHECK(t->size(1) < (int64_t{1} << 31) - 4096, name, " has shape ", shape_text(*t), "; sizes must fit 32 bits");
  }
  bool alike = cos.scalar_type() == sin.scalar_type();
  for (int i = 0; i < 4; ++i)
    alike = alike && cos.size(i) == sin.size(i) && (cos.size(i) <= 1 || cos.stride(i) == sin.stride(i));
  VDIT_CHECK(alike, argument(s.name), "_cos and ", s.name, "_sin differ in shape, strides or dtype: ", shape_text(cos),
             " ", dtype_text(cos.scalar_type()), " and ", shape_text(sin), " ", dtype_text(sin.scalar_type()),
             "; call .contiguous() on both");
  rope.dtype = kernel_dtype(cos, argument(s.name + "_cos"));
  rope.cos = cos.const_data_ptr();
  rope.sin = sin.const_data_ptr();
  rope.batch_stride = cos.size(0) == 1 ? 0 : cos.stride(0);
  rope.row_stride = cos.stride(1);
  rope.head_stride = cos.size(2) == 1 ? 0 : cos.stride(2);
  rope.rows = int32_t(cos.size(1));
  rope.half = cos.size(3) == p.rotary ? 0 : 1;
  if (s.positions) {
    rope.positions = token_ints(*s.positions, argument(s.name + "_positions"), s.x, s.x.size(1), false);
    return rope;
  }
  VDIT_CHECK(s.start >= 0 && s.start <= s.x.size(1) - cos.size(1), argument(s.name), " has ", s.x.size(1),
             " tokens but its table rotates ", cos.size(1), " tokens from token ", s.start,
             " on; the rows of the table must lie within the tokens");
  rope.start = int32_t(s.start);
  return rope;
}

QkStream stream(const QkNormRopeParams& p, const Source& s, const Tensor& q, bool copy) {
  QkStream to{};
  const std::string name = argument(s.name), out_name = argument(s.name + "_out");
  to.x = token_rows(s.x, name);
  VDIT_CHECK(s.x.scalar_type() == q.scalar_type() && same_device(s.x, q), name, " is ", dtype_text(s.x.scalar_type()),
             " on ", device_text(s.x), " but q is ", dtype_text(q.scalar_type()), " on ", device_text(q),
             "; they must be alike");
  VDIT_CHECK(s.x.size(0) == p.batch && s.x.size(3) == p.dim, name, " has shape ", shape_text(s.x), " but q has ",
             shape_text(q), "; batch and head dim must be the same");
  VDIT_CHECK(s.out.has_value(), out_name, " is missing; every one of q, k and v needs its destination");
  const TokenRows out = token_rows(*s.out, out_name);
  VDIT_CHECK(s.out->scalar_type() == q.scalar_type() && same_device(*s.out, q), out_name, " is ",
             dtype_text(s.out->scalar_type()), " on ", device_text(*s.out), " but q is ", dtype_text(q.scalar_type()),
             " on ", device_text(q), "; they must be alike");
  VDIT_CHECK(s.out->size(0) == p.batch && s.out->size(2) == s.x.size(2) && s.out->size(3) == p.dim &&
                 (s.rows.has_value() || s.out->size(1) == s.x.size(1)),
             out_name, " has shape ", shape_text(*s.out), "; expected [", p.batch, ", ",
             s.rows.has_value() ? "any" : std::to_string(s.x.size(1)), ", ", s.x.size(2), ", ", p.dim, "]");
  for (int i = 0; i < 4; ++i)
    VDIT_CHECK(s.out->size(i) <= 1 || s.out->stride(i) != 0, out_name, " has stride 0 in dimension ", i,
               "; its elements share memory, pass a tensor that is not expanded");
  to.out = s.out->mutable_data_ptr();
  VDIT_CHECK(!s.rows.has_value() || s.out->numel() == 0 || to.out != to.x.data, out_name, " is ", s.name,
             " itself, but ", s.rows_name, " moves its tokens; pass another destination");
  to.out_batch_stride = out.batch_stride;
  to.out_row_stride = out.row_stride;
  to.out_head_stride = out.head_stride;
  to.tokens = int32_t(s.x.size(1));
  to.heads = int32_t(s.x.size(2));
  to.out_tokens = int32_t(s.out->size(1));
  if (s.rows) to.rows = token_ints(*s.rows, argument(s.rows_name), s.x, s.x.size(1), false);
  to.copy = copy ? 1 : 0;
  if (copy) return to;
  DType bias_dtype = DType::f32;
  to.weight = affine(p, s, s.weight, "weight", to.weight_dtype);
  to.bias = affine(p, s, s.bias, "bias", bias_dtype);
  VDIT_CHECK(to.bias == nullptr || (to.weight != nullptr && bias_dtype == to.weight_dtype), argument(s.name),
             "_bias needs a weight of its own dtype beside it");
  to.rope = rope_table(p, s);
  return to;
}

// Whether the tokens of both are written to the same places. With rows they may differ.
bool same_memory(const QkStream& a, const QkStream& b) {
  const bool empty = a.tokens == 0 || b.tokens == 0 || a.heads == 0 || b.heads == 0;
  return !empty && a.out != nullptr && a.out == b.out && a.rows.data == b.rows.data;
}

QkNormRopeParams prepare(const Tensor& q, const Maybe& k, const Maybe& v, const Maybe& q_weight, const Maybe& q_bias,
                         const Maybe& k_weight, const Maybe& k_bias, const Maybe& q_cos, const Maybe& q_sin,
                         const Maybe& k_cos, const Maybe& k_sin, const Maybe& q_positions, const Maybe& k_positions,
                         const Maybe& q_rows, const Maybe& kv_rows, int64_t norm, double eps, int64_t rotary,
                         const std::vector<int64_t>& axes, int64_t q_start, int64_t k_start, int64_t rounding,
                         bool round_products, bool relu, const Tensor& q_out, const Maybe& k_out, const Maybe& v_out) {
  QkNormRopeParams p{};
  token_rows(q, argument("q"));
  p.batch = int32_t(q.size(0));
  p.dim = int32_t(q.size(3));
  p.dtype = kernel_dtype(q, argument("q"));
  VDIT_CHECK(norm >= 0 && norm <= int64_t(QkNorm::layer), "qk_norm_rope: norm is ", norm, "; expected 0 to 3");
  p.norm = QkNorm(norm);
  VDIT_CHECK(rounding >= 0 && rounding <= int64_t(QkRounding::before_weight), "qk_norm_rope: rounding is ", rounding,
             "; expected 0 to 2");
  p.rounding = QkRounding(rounding);
  VDIT_CHECK(eps >= 0 && eps < 1e30, "qk_norm_rope: eps is ", eps, "; it must be a finite number, 0 or larger");
  p.eps = float(eps);
  p.round_products = round_products ? 1 : 0;
  p.relu = relu ? 1 : 0;
  VDIT_CHECK(rotary >= 0 && rotary <= p.dim && rotary % 2 == 0, "qk_norm_rope: rotary is ", rotary,
             "; it must be even and at most the head dim ", p.dim);
  p.rotary = int32_t(rotary);
  VDIT_CHECK(axes.size() <= kMaxRopeAxes, "qk_norm_rope: axes has ", axes.size(), " widths; at most ", kMaxRopeAxes);
  int64_t sum = 0;
  for (const int64_t width : axes) {
    VDIT_CHECK(width > 0 && width % 2 == 0 && width <= rotary, "qk_norm_rope: axes has the width ", width,
               "; widths are even and positive");
    p.width[p.axes++] = int32_t(width);
    sum += width;
  }
  VDIT_CHECK(p.axes == 0 || sum == rotary, "qk_norm_rope: axes add up to ", sum, " but ", rotary,
             " channels are rotated");
  VDIT_CHECK(k.has_value() || (!k_weight && !k_bias && !k_cos && !k_positions && !k_out),
             "qk_norm_rope: k is not given, but something that belongs to it is");
  VDIT_CHECK(v.has_value() || !v_out, "qk_norm_rope: v_out is given, but v is not");
  VDIT_CHECK(k.has_value() || v.has_value() || !kv_rows, "qk_norm_rope: kv_rows is given, but neither k nor v is");
  p.stream[p.streams++] =
      stream(p, {"q", q, q_weight, q_bias, q_cos, q_sin, q_positions, q_rows, q_out, "q_rows", q_start}, q, false);
  if (k) {
    p.stream[p.streams++] =
        stream(p, {"k", *k, k_weight, k_bias, k_cos, k_sin, k_positions, kv_rows, k_out, "kv_rows", k_start}, q, false);
  }
  if (v) p.stream[p.streams++] = stream(p, {"v", *v, {}, {}, {}, {}, {}, kv_rows, v_out, "kv_rows", 0}, q, true);
  for (int i = 0; i < p.streams; ++i)
    for (int j = 0; j < i; ++j)
      VDIT_CHECK(!same_memory(p.stream[i], p.stream[j]),
                 "qk_norm_rope: two of q_out, k_out and v_out are the same memory; each needs its own");
  return p;
}

#define VDIT_QK_ARGUMENTS                                                                                              \
  const Tensor &q, const Maybe &k, const Maybe &v, const Maybe &q_weight, const Maybe &q_bias, const Maybe &k_weight,  \
      const Maybe &k_bias, const Maybe &q_cos, const Maybe &q_sin, const Maybe &k_cos, const Maybe &k_sin,             \
      const Maybe &q_positions, const Maybe &k_positions, const Maybe &q_rows, const Maybe &kv_rows, int64_t norm,     \
      double eps, int64_t rotary, const std::vector<int64_t>&axes, int64_t q_start, int64_t k_start, int64_t rounding, \
      bool round_products, bool relu, const Tensor &q_out, const Maybe &k_out, const Maybe &v_out
#define VDIT_QK_VALUES                                                                                                \
  q, k, v, q_weight, q_bias, k_weight, k_bias, q_cos, q_sin, k_cos, k_sin, q_positions, k_positions, q_rows, kv_rows, \
      norm, eps, rotary, axes, q_start, k_start, rounding, round_products, relu, q_out, k_out, v_out

void qk_norm_rope_cpu(VDIT_QK_ARGUMENTS) {
  const QkNormRopeParams p = prepare(VDIT_QK_VALUES);
  int64_t token_elements = 1;
  for (int i = 0; i < p.streams; ++i) token_elements += int64_t{p.stream[i].heads} * p.dim;
  constexpr int64_t kElementsPerTask = 1 << 15;
  std::atomic<int32_t> problems{kQkFine};
  torch::stable::parallel_for(0, qk_norm_rope_items(p), std::max<int64_t>(1, kElementsPerTask / token_elements),
                              [&](int64_t first, int64_t last) { problems |= cpu_qk_norm_rope(p, first, last); });
  VDIT_CHECK(
      (problems & kQkBadPosition) == 0,
      "qk_norm_rope: positions have entries outside the rows of the table; -1 marks a token that is not rotated");
  VDIT_CHECK((problems & kQkBadRow) == 0,
             "qk_norm_rope: q_rows or kv_rows have entries outside the tokens of the destination");
}

#ifdef VDIT_CUDA
void qk_norm_rope_cuda(VDIT_QK_ARGUMENTS) {
  const QkNormRopeParams p = prepare(VDIT_QK_VALUES);
  VDIT_CHECK(p.dim <= kMaxHeadDim, "qk_norm_rope: the head dim is ", p.dim, "; the CUDA kernel takes at most ",
             kMaxHeadDim);
  for (int i = 0; i < p.streams; ++i) {
    VDIT_CHECK(p.norm != QkNorm::rms_across || int64_t{p.stream[i].heads} * ((p.dim + 7) / 8 * 8) <= kMaxAcrossWidth,
               "qk_norm_rope: ", p.stream[i].heads, " heads of ", p.dim,
               " channels; a norm across heads takes at most ", kMaxAcrossWidth, " channels on CUDA devices");
  }
  const int32_t device = q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_cuda(cuda_qk_norm_rope(p, current_cuda_stream(device)), "qk_norm_rope");
}
#else
void qk_norm_rope_cuda(VDIT_QK_ARGUMENTS) {
  (void)prepare(VDIT_QK_VALUES);
  fail_without_cuda("qk_norm_rope");
}
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) { m.impl("qk_norm_rope", TORCH_BOX(&vdit::qk_norm_rope_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("qk_norm_rope", TORCH_BOX(&vdit::qk_norm_rope_cuda)); }

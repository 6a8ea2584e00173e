#include "ops/token_args.h"

namespace vdit {

TokenRows token_rows(const Tensor& x, const std::string& what) {
  VDIT_CHECK(x.dim() == 4, what, " has shape ", shape_text(x), "; expected [batch, tokens, heads, dim]");
  VDIT_CHECK(x.size(3) <= 1 || x.stride(3) == 1, what, " has stride ", x.stride(3),
             " in its last dimension; it must be contiguous there: call .contiguous()");
  for (int i = 0; i < 4; ++i)
    VDIT_CHECK(x.size(i) < (int64_t{1} << 31) - 4096, what, " has shape ", shape_text(x), "; sizes must fit 32 bits");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

static int32_t int_bytes(const Tensor& t, const std::string& what, const Tensor& x, bool wide_allowed) {
  const bool wide = t.scalar_type() == ScalarType::Long;
  VDIT_CHECK(t.scalar_type() == ScalarType::Int || (wide && wide_allowed), what, " is ", dtype_text(t.scalar_type()),
             "; expected int32", wide_allowed ? " or int64" : "");
  VDIT_CHECK(same_device(t, x), what, " is on ", device_text(t), " but the tokens are on ", device_text(x));
  return wide ? 8 : 4;
}

TokenInts token_ints(const Tensor& t, const std::string& what, const Tensor& x, int64_t entries, bool wide_allowed) {
  const int32_t bytes = int_bytes(t, what, x, wide_allowed);
  const int64_t batch = x.size(0), heads = x.size(2);
  VDIT_CHECK(t.dim() == 3 && (t.size(0) == 1 || t.size(0) == batch) && (t.size(1) == 1 || t.size(1) == heads) &&
                 (entries < 0 || t.size(2) == entries) && t.size(2) < (int64_t{1} << 31) - 4096,
             what, " has shape ", shape_text(t), "; expected [1 or ", batch, ", 1 or ", heads, ", ",
             entries < 0 ? "any" : std::to_string(entries), "]");
  return {t.const_data_ptr(), t.size(0) == 1 ? 0 : t.stride(0), t.size(1) == 1 ? 0 : t.stride(1), t.stride(2), bytes};
}

TokenInts token_limits(const std::optional<Tensor>& kv_len, const std::string& what, const Tensor& x) {
  if (!kv_len) return {};
  const int32_t bytes = int_bytes(*kv_len, what, x, true);
  VDIT_CHECK(kv_len->dim() == 1 && kv_len->size(0) == x.size(0), what, " has shape ", shape_text(*kv_len),
             "; expected [batch] = [", x.size(0), "]");
  return {kv_len->const_data_ptr(), kv_len->stride(0), 0, 0, bytes};
}

}  // namespace vdit

// Checks of what the adaptive norms and the feature cache take: rows [batch, tokens, dim] in float32 or the one 16-bit
// dtype of the call, and tables of rows that tokens share.
#pragma once
#include <algorithm>
#include <optional>
#include <string>

#include "kernels/fused/adaln.h"
#include "ops/common.h"

namespace vdit {

using Optional = std::optional<Tensor>;

// Checks the arguments of one call and collects its parameters; a member checks what it is given against `x`, which
// messages call `anchor`. Whoever derives from it sets batch, tokens, dim and half (f32: no 16-bit tensor was seen yet)
// of the parameters first.
template <class Params>
class TokenCall {
 public:
  Params p{};

  TokenCall(const char* op, const Tensor& x, bool eager, const char* anchor = "x")
      : op_(op), anchor_(anchor), x_(x), eager_(eager) {}

  AdaLNTable table(const std::string& name, const Optional& data, const Optional& base) {
    AdaLNTable t{};
    const std::string base_name = name + "_base";
    VDIT_CHECK(data || !base, op_, ": ", base_name, " without ", name, "; pass ", base_name, " as ", name, " then");
    if (!data) return t;
    VDIT_CHECK(data->dim() == 3 && (data->size(0) == 1 || data->size(0) == p.batch) && data->size(2) == p.dim, op_,
               ": ", name, " has shape ", shape_text(*data), "; expected [1 or ", p.batch, ", rows, ", p.dim, "]");
    last_contiguous(*data, name);
    same_place(*data, name);
    const DType type = dtype(*data, name);
    VDIT_CHECK(!any_row_ || type == p.row_dtype, op_, ": ", name, " is ", dtype_text(data->scalar_type()),
               " but another table is not; convert all tables to one dtype");
    p.row_dtype = type;
    t.data = data->const_data_ptr();
    t.batch_stride = data->size(0) == 1 ? 0 : data->stride(0);
    t.row_stride = data->stride(1);
    VDIT_CHECK(data->size(1) >= 1 || p.batch * p.tokens == 0, op_, ": ", name, " has no rows");
    VDIT_CHECK(data->size(1) <= INT32_MAX, op_, ": ", name, " has ", data->size(1), " rows; at most ", INT32_MAX);
    t.rows = int32_t(data->size(1));
    any_row_ = true;
    if (base) {
      t.base = vector(*base, base_name);
      const DType base_type = dtype(*base, base_name);
      VDIT_CHECK(!any_base_ || base_type == p.base_dtype, op_, ": ", base_name, " is ", dtype_text(base->scalar_type()),
                 " but another base is not; convert the bases to one dtype");
      p.base_dtype = base_type;
      any_base_ = true;
    }
    t.round = eager_ && type != DType::f32 && (!base || p.base_dtype != DType::f32);
    return t;
  }

  // The rows of the tokens.
  void tokens_of(const Optional& index) {
    if (!index) return;
    VDIT_CHECK(index->scalar_type() == ScalarType::Int, op_, ": index is ", dtype_text(index->scalar_type()),
               "; convert it to int32");
    const int64_t dims = index->dim();
    VDIT_CHECK((dims == 1 || (dims == 2 && index->size(0) == p.batch)) && index->size(dims - 1) == p.tokens, op_,
               ": index has shape ", shape_text(*index), "; expected [", p.tokens, "] or [", p.batch, ", ", p.tokens,
               "]");
    same_place(*index, "index");
    p.index = index->const_data_ptr<int32_t>();
    p.index_batch_stride = dims == 2 ? index->stride(0) : 0;
    p.index_stride = index->stride(dims - 1);
    indexed_ = true;
  }

  // After tokens_of: whether the table has a row for every token.
  void rows_fit(const AdaLNTable& t, const std::string& name) {
    if (t.rows <= 1) return;
    VDIT_CHECK(indexed_ || t.rows == p.tokens, op_, ": ", name, " has ", t.rows, " rows for ", p.tokens,
               " tokens; pass one row, one per token, or an index");
    VDIT_CHECK(rows_ == 0 || rows_ == t.rows, op_, ": ", name, " has ", t.rows, " rows but another table ", rows_,
               "; one index serves all tables");
    rows_ = t.rows;
  }

  // On a CPU: every index inside its table.
  void check_indices() const {
    if (p.index == nullptr || rows_ == 0) return;
    const int64_t batches = p.index_batch_stride == 0 ? std::min<int64_t>(p.batch, 1) : p.batch;
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t n = 0; n < p.tokens; ++n) {
        const int32_t row = p.index[b * p.index_batch_stride + n * p.index_stride];
        VDIT_CHECK(row >= 0 && row < rows_, op_, ": index ", row, " of token ", n, " is outside the table's ", rows_,
                   " rows");
      }
  }

 protected:
  bool same_shape(const Tensor& t) const {
    return std::equal(t.sizes().begin(), t.sizes().end(), x_.sizes().begin(), x_.sizes().end());
  }

  void same_place(const Tensor& t, const std::string& name) const {
    VDIT_CHECK(same_device(t, x_), op_, ": ", name, " is on ", device_text(t), " but ", anchor_, " is on ",
               device_text(x_), "; move them to one device");
  }

  void last_contiguous(const Tensor& t, const std::string& name) const {
    const int64_t last = t.dim() - 1;
    VDIT_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op_, ": ", name, " has stride ", t.stride(last),
               " in its last dimension; it must be contiguous there: call .contiguous()");
  }

  // float32, or the one 16-bit dtype of the call.
  DType dtype(const Tensor& t, const std::string& name) {
    const DType type = kernel_dtype(t, std::string(op_) + ": " + name);
    if (type == DType::f32) return type;
    VDIT_CHECK(p.half == DType::f32 || p.half == type, op_, ": ", name, " is ", dtype_text(t.scalar_type()),
               " beside the other 16-bit dtype; convert it");
    p.half = type;
    return type;
  }

  AdaLNRows rows(const Tensor& t, const std::string& name) {
    last_contiguous(t, name);
    same_place(t, name);
    return {t.const_data_ptr(), t.stride(0), t.stride(1), dtype(t, name)};
  }

  const void* vector(const Tensor& t, const std::string& name) const {
    VDIT_CHECK(t.dim() == 1 && t.size(0) == p.dim, op_, ": ", name, " has shape ", shape_text(t), "; expected [", p.dim,
               "]");
    last_contiguous(t, name);
    same_place(t, name);
    return t.const_data_ptr();
  }

  const char *op_, *anchor_;
  Tensor x_;
  bool eager_;

 private:
  bool any_row_ = false, any_base_ = false, indexed_ = false;
  int32_t rows_ = 0;  // of the tables with more than one
};

}  // namespace vdit

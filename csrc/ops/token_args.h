// Checks of what the operators on tokens take: rows [batch, tokens, heads, dim], integers per token, lengths.
#pragma once
#include <optional>

#include "kernels/select/views.h"
#include "ops/common.h"

namespace vdit {

// x [batch, tokens, heads, dim] with a contiguous last dimension and sizes that 32 bits hold. `what` names operator and
// argument, as in "block_mean: x".
TokenRows token_rows(const Tensor& x, const std::string& what);

// int32, or int64 where `wide_allowed`, [1|batch, 1|heads, entries] on the device of x. entries < 0: any number.
TokenInts token_ints(const Tensor& t, const std::string& what, const Tensor& x, int64_t entries, bool wide_allowed);

// int32 or int64 [batch] on the device of x, or nothing.
TokenInts token_limits(const std::optional<Tensor>& kv_len, const std::string& what, const Tensor& x);

}  // namespace vdit

// Checks of the attention operators' arguments that hold on every device. They look at shapes, dtypes, strides and
// devices; what is inside a plan or kv_len is checked by the CPU path and clamped by the GPU kernels.
#pragma once
#include <optional>
#include <vector>

#include "ops/common.h"

namespace vdit {

using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;

constexpr int64_t kMaxHeadDim = 256;

void check_qkv(const Tensor& q, const Tensor& k, const Tensor& v);

// The scale as the kernels take it; throws unless it is finite. `op` begins the message.
float checked_scale(double scale, const char* op = "attention");

// An fp32 tensor [batch, heads, queries].
void check_rows(const Tensor& t, const char* name, const Tensor& q);

// columns == 0: one-dimensional.
void check_int_list(const Tensor& t, const char* name, int64_t columns, const Tensor& q);

// tiles, run_ptr, runs and mask_bits of a plan; throws also where there are orders but no tiles. Returns whether there
// is a plan.
bool check_plan_lists(const Tensor& q, const Optional& tiles, const Optional& run_ptr, const Optional& runs,
                      const Optional& mask_bits, const Optional& q_order, const Optional& kv_order);

// dtype, device and rank of an order.
void check_order(const Tensor& t, const char* name, const Tensor& q);

// Lengths [batch]; returns whether the entries are int64.
bool check_kv_len(const Tensor& t, const Tensor& q, const char* op = "attention", const char* name = "kv_len");

void check_segments(const Tensors& segment_k, const Tensors& segment_v, const Tensor& q, const Tensor& k);

// What attention_backward is given beside the arguments of attention.
void check_backward(const Tensor& dout, const Optional& dlse, const Tensor& out, const Tensor& lse, const Tensor& q);

}  // namespace vdit

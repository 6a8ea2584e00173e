// From the attention operators' arguments to the parameters of the CUDA kernels: checks of what the kernels ask for
// beyond attention_args.h. Nothing on the device is read.
#pragma once
#include "ops/attention_args.h"

#ifdef VDIT_CUDA
#include "kernels/attention/forward.h"

namespace vdit {

constexpr const char* kElsewhere = "move the tensors to the CPU, or call vdit_fast.reference.attention";

// Kernels copy 16 bytes at a time: a row is contiguous and begins at a multiple of 16 bytes.
bool has_aligned_rows(const Tensor& t);

// Strides and address of a tensor [batch, tokens, heads, dim]; throws unless its rows are aligned. `op` begins the
// message, here and below.
gpu::Rows rows_of(const Tensor& t, const std::string& name, const char* op = "attention");

// What the kernels may use of a GPU; throws if it is too old.
gpu::ForwardOptions options_for(int32_t device, const char* op = "attention");

// Checks all arguments. They must outlive the result.
gpu::AttentionParams cuda_params(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& tiles,
                                 const Optional& run_ptr, const Optional& runs, const Optional& mask_bits,
                                 const Optional& q_order, const Optional& kv_order, int64_t plan_batch,
                                 int64_t plan_heads, double scale, const Optional& row_scale, const Optional& kv_len,
                                 const Tensors& segment_k, const Tensors& segment_v);

}  // namespace vdit
#endif

// Every kernel of the package, for `vdit_fast._info.kernel_catalogue()`. One line per kernel and device.
#pragma once

namespace vdit {

struct KernelEntry {
  const char* op;       // operator in torch.ops.vdit_fast
  const char* device;   // "cpu" or "cuda"
  const char* variant;  // "portable", or the one architecture it is written for
  const char* dtypes;   // element types, space-separated
};

constexpr KernelEntry kCatalogue[] = {
    {"adaln_modulate", "cpu", "portable", "float32 float16 bfloat16"},
    {"adaln_modulate", "cuda", "portable", "float32 float16 bfloat16"},
    {"attention", "cpu", "portable", "float32 float16 bfloat16"},
    {"attention", "cuda", "portable", "float16 bfloat16"},
    {"attention", "cuda", "sm_90a", "float16 bfloat16"},
    {"attention_backward", "cpu", "portable", "float32 float16 bfloat16"},
    {"attention_backward", "cuda", "portable", "float16 bfloat16"},
    {"block_mass", "cpu", "portable", "float32 float16 bfloat16"},
    {"block_mass", "cuda", "portable", "float16 bfloat16"},
    {"block_mean", "cpu", "portable", "float32 float16 bfloat16"},
    {"block_mean", "cuda", "portable", "float32 float16 bfloat16"},
    {"combine_rows", "cpu", "portable", "float32 float16 bfloat16"},
    {"combine_rows", "cuda", "portable", "float32 float16 bfloat16"},
    {"compile_blocks", "cpu", "portable", "bool"},
    {"compile_blocks", "cuda", "portable", "bool"},
    {"counting_sort", "cpu", "portable", "int32"},
    {"counting_sort", "cuda", "portable", "int32"},
    {"factor_update", "cpu", "portable", "float32 float16 bfloat16 float8_e4m3fn"},
    {"factor_update", "cuda", "portable", "float32 float16 bfloat16 float8_e4m3fn"},
    {"forecast_gate_add", "cpu", "portable", "float32 float16 bfloat16 float8_e4m3fn"},
    {"forecast_gate_add", "cuda", "portable", "float32 float16 bfloat16 float8_e4m3fn"},
    {"gate_residual", "cpu", "portable", "float32 float16 bfloat16"},
    {"gate_residual", "cuda", "portable", "float32 float16 bfloat16"},
    {"gate_residual_norm", "cpu", "portable", "float32 float16 bfloat16"},
    {"gate_residual_norm", "cuda", "portable", "float32 float16 bfloat16"},
    {"gather_rows", "cpu", "portable", "float32 float16 bfloat16 int32 int16"},
    {"gather_rows", "cuda", "portable", "float32 float16 bfloat16 int32 int16"},
    {"kmeans_assign", "cpu", "portable", "float32 float16 bfloat16"},
    {"kmeans_assign", "cuda", "portable", "float16 bfloat16"},
    {"linear_attention_readout", "cpu", "portable", "float32 float16 bfloat16"},
    {"linear_attention_readout", "cuda", "portable", "float32 float16 bfloat16"},
    {"linear_attention_state", "cpu", "portable", "float32 float16 bfloat16"},
    {"linear_attention_state", "cuda", "portable", "float32 float16 bfloat16"},
    {"merge", "cpu", "portable", "float32 float16 bfloat16"},
    {"merge", "cuda", "portable", "float32 float16 bfloat16"},
    {"pack_slices", "cpu", "portable", "float32 float16 bfloat16 int32 int16"},
    {"pack_slices", "cuda", "portable", "float32 float16 bfloat16 int32 int16"},
    {"permute_tokens", "cpu", "portable", "float32 float16 bfloat16 int32 int16"},
    {"permute_tokens", "cuda", "portable", "float32 float16 bfloat16 int32 int16"},
    {"qk_norm_rope", "cpu", "portable", "float32 float16 bfloat16"},
    {"qk_norm_rope", "cuda", "portable", "float32 float16 bfloat16"},
    {"scatter_rows", "cpu", "portable", "float32 float16 bfloat16 int32 int16"},
    {"scatter_rows", "cuda", "portable", "float32 float16 bfloat16 int32 int16"},
    {"score_lse", "cpu", "portable", "float32 float16 bfloat16"},
    {"score_lse", "cuda", "portable", "float16 bfloat16"},
    {"select_top_k", "cpu", "portable", "float32"},
    {"select_top_k", "cuda", "portable", "float32"},
    {"select_top_p", "cpu", "portable", "float32"},
    {"select_top_p", "cuda", "portable", "float32"},
    {"short_attention", "cpu", "portable", "float32 float16 bfloat16"},
    {"short_attention", "cuda", "portable", "float32 float16 bfloat16"},
    {"softmax_mass", "cpu", "portable", "float32 float16 bfloat16"},
    {"softmax_mass", "cuda", "portable", "float16 bfloat16"},
    {"unpack_slices", "cpu", "portable", "float32 float16 bfloat16 int32 int16"},
    {"unpack_slices", "cuda", "portable", "float32 float16 bfloat16 int32 int16"},
};

}  // namespace vdit

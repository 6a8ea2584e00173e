// The schema of every operator in torch.ops.vdit_fast. Kernels are registered next to their code, in the other files.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vdit_fast, m) {
  m.def(
      "adaln_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? scale_base, Tensor? shift_base, Tensor? index, "
      "int norm, float eps, Tensor? weight, Tensor? bias, bool eager) -> Tensor");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? tiles, Tensor? run_ptr, Tensor? runs, "
      "Tensor? mask_bits, Tensor? q_order, Tensor? kv_order, int plan_batch, int plan_heads, float scale, "
      "Tensor? row_scale, Tensor? kv_len, Tensor[] segment_k, Tensor[] segment_v) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
      "Tensor? tiles, Tensor? run_ptr, Tensor? runs, Tensor? mask_bits, Tensor? q_order, Tensor? kv_order, int "
      "plan_batch, int plan_heads, float scale, "
      "Tensor? row_scale, Tensor? kv_len, Tensor[] segment_k, Tensor[] segment_v) -> "
      "(Tensor, Tensor, Tensor, Tensor[], Tensor[])");
  m.def(
      "block_mass(Tensor q, Tensor k, Tensor lse, int q_block, int kv_block, float scale, int fold, Tensor? kv_len) -> "
      "Tensor");
  m.def("block_mean(Tensor x, Tensor lengths, Tensor? order, Tensor? kv_len) -> (Tensor, Tensor)");
  m.def(
      "combine_rows(Tensor rows, Tensor slots, Tensor? weights, Tensor? base, Tensor? residual, Tensor? gate) -> "
      "Tensor");
  m.def(
      "compile_blocks(Tensor keep, Tensor q_len, Tensor kv_len, int lq, int? q_tile=None) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("counting_sort(Tensor labels, int classes) -> (Tensor, Tensor)");
  m.def(
      "factor_update(Tensor(a!) factors, Tensor output, Tensor? minus, float distance, int known, Tensor(b!)? scales) "
      "-> ()");
  m.def(
      "forecast_gate_add(Tensor? x, Tensor[] factors, Tensor?[] gates, Tensor?[] bases, Tensor? index, "
      "float[] weights, bool eager, Tensor?[] scales, Tensor(a!) out) -> ()");
  m.def(
      "gate_residual(Tensor x, Tensor y, Tensor? gate, Tensor? gate_base, Tensor? index, bool tanh_gate, "
      "int post_norm, float post_eps, Tensor? post_weight, Tensor? post_bias, bool eager) -> Tensor");
  m.def(
      "gate_residual_norm(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? gate_base, "
      "Tensor? scale_base, Tensor? shift_base, Tensor? index, bool tanh_gate, int post_norm, float post_eps, "
      "Tensor? post_weight, Tensor? post_bias, int norm, float eps, Tensor? weight, Tensor? bias, bool eager) -> "
      "(Tensor, Tensor)");
  m.def("gather_rows(Tensor[] full, Tensor rows, Tensor? count) -> Tensor[]");
  m.def("kmeans_assign(Tensor x, Tensor centroids) -> Tensor");
  m.def(
      "linear_attention_readout(Tensor q, Tensor state, int feature_map, Tensor? weight, Tensor? q_den, float eps) -> "
      "Tensor");
  m.def(
      "linear_attention_state(Tensor k, Tensor v, int feature_map, Tensor? weight, Tensor? k_den, Tensor? kv_len) -> "
      "Tensor");
  m.def("merge(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
  m.def("pack_slices(Tensor[] x, int[] sizes, int dim, int compression, int block) -> Tensor");
  m.def("permute_tokens(Tensor x, Tensor order, bool inverse) -> Tensor");
  m.def(
      "qk_norm_rope(Tensor q, Tensor? k, Tensor? v, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? "
      "k_bias, "
      "Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin, Tensor? q_positions, Tensor? k_positions, "
      "Tensor? q_rows, Tensor? kv_rows, int norm, float eps, int rotary, int[] axes, int q_start, int k_start, "
      "int rounding, bool round_products, bool relu, Tensor(a!) q_out, Tensor(b!)? k_out, Tensor(c!)? v_out) -> ()");
  m.def("scatter_rows(Tensor(a!)[] full, Tensor[] part, Tensor rows, Tensor? count, Tensor? gate, bool add) -> ()");
  m.def("score_lse(Tensor q, Tensor k, float scale, int fold, Tensor? kv_len) -> Tensor");
  m.def("select_top_k(Tensor scores, Tensor? k_rows, int k) -> Tensor");
  m.def("select_top_p(Tensor mass, float p, int min_keep) -> Tensor");
  m.def("short_attention(Tensor q, Tensor k, Tensor v, float scale, bool causal=False, Tensor? kv_len=None) -> Tensor");
  m.def(
      "softmax_mass(Tensor q, Tensor k, int q_block, int kv_block, float scale, int fold, Tensor? q_len, "
      "Tensor? kv_len) -> Tensor");
  m.def(
      "unpack_slices(Tensor buffer, int[] shapes, int[] sizes, int dim, int compression, int block, int dtype) -> "
      "Tensor[]");
}

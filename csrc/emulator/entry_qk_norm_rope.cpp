// QK norm and RoPE, through the host entry that the CUDA operator calls.
#include "emulator/harness.h"
#include "kernels/fused/qk_norm_rope.h"

using namespace vdit;

namespace {

size_t element_bytes(DType type) { return type == DType::f32 ? 4 : 2; }

// What the original promises of its first byte.
size_t alignment(const void* data, size_t elem) { return reinterpret_cast<uintptr_t>(data) % 16 == 0 ? 16 : elem; }

struct Names {  // they outlive the buffers
  const char *x, *out, *weight, *bias, *rows, *positions, *cos, *sin;
};
constexpr Names kNames[] = {
    {"q", "q_out", "q_weight", "q_bias", "q_rows", "q_positions", "q_cos", "q_sin"},
    {"k", "k_out", "k_weight", "k_bias", "kv_rows of k", "k_positions", "k_cos", "k_sin"},
    {"v", "v_out", "", "", "kv_rows of v", "", "", ""},
};

void guard(emu::Harness& h, const Names& name, const QkNormRopeParams& p, QkStream& s) {
  const size_t elem = element_bytes(p.dtype), weight = element_bytes(s.weight_dtype);
  s.x.data = h.input_strided(name.x, s.x.data, elem, {p.batch, s.tokens, s.heads, p.dim},
                             {s.x.batch_stride, s.x.row_stride, s.x.head_stride, 1}, alignment(s.x.data, elem));
  const size_t width = size_t(p.norm == QkNorm::rms_across ? s.heads : 1) * p.dim;
  s.weight = h.input_bytes(name.weight, s.weight, width * weight, alignment(s.weight, weight));
  s.bias = h.input_bytes(name.bias, s.bias, width * weight, alignment(s.bias, weight));
  const auto ints = [&](const char* what, TokenInts& t) {
    t.data = h.input_strided(what, t.data, 4, {p.batch, s.heads, s.tokens, 1},
                             {t.batch_stride, t.head_stride, t.stride, 1}, 4);
  };
  RopeTable& r = s.rope;
  ints(name.rows, s.rows);
  ints(name.positions, r.positions);
  const size_t entry = element_bytes(r.dtype);
  const std::vector<int64_t> sizes = {p.batch, r.rows, s.heads, r.half != 0 ? p.rotary / 2 : p.rotary};
  const std::vector<int64_t> strides = {r.batch_stride, r.row_stride, r.head_stride, 1};
  r.cos = h.input_strided(name.cos, r.cos, entry, sizes, strides, alignment(r.cos, entry));
  r.sin = h.input_strided(name.sin, r.sin, entry, sizes, strides, alignment(r.sin, entry));
  if (int64_t{p.batch} * s.out_tokens * s.heads * p.dim == 0) return;
  const int64_t last = (p.batch - 1) * s.out_batch_stride + (s.out_tokens - 1) * s.out_row_stride +
                       (s.heads - 1) * s.out_head_stride + p.dim;
  s.out = h.inout_bytes(name.out, s.out, size_t(last) * elem, alignment(s.out, elem));
}

}  // namespace

VDIT_EMU_EXPORT size_t vdit_emu_qk_norm_rope_params_bytes() { return sizeof(QkNormRopeParams); }

VDIT_EMU_EXPORT int vdit_emu_qk_norm_rope(const QkNormRopeParams* params, const emu::Policy* policy, char* error,
                                          size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    QkNormRopeParams p = *params;
    for (int i = 0; i < p.streams; ++i) guard(h, kNames[i], p, p.stream[i]);
    const int code = cuda_qk_norm_rope(p, nullptr);
    h.finish();
    return code;
  });
}

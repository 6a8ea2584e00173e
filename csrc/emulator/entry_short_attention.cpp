// Short attention, through the host entry that the CUDA operator calls.
#include "emulator/harness.h"
#include "kernels/short/short_attention.h"

using namespace vdit;

VDIT_EMU_EXPORT size_t vdit_emu_short_attention_params_bytes() { return sizeof(ShortAttentionParams); }

VDIT_EMU_EXPORT int vdit_emu_short_attention(const ShortAttentionParams* params, const emu::Policy* policy, char* error,
                                             size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    ShortAttentionParams p = *params;
    const size_t elem = p.dtype == DType::f32 ? 4 : 2;
    auto guard = [&](const char* name, ShortView& x, int64_t rows) {
      std::vector<int64_t> strides(x.stride, x.stride + 5);
      std::vector<int64_t> sizes{p.batch, rows, p.places, p.heads, p.dim};
      if (x.stride[4] != 1) sizes.push_back(1), strides.push_back(1);
      const bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
      x.data = h.input_strided(name, x.data, elem, sizes, strides, aligned ? 16 : elem);
    };
    guard("q", p.q, p.lq);
    guard("k", p.k, p.lk);
    guard("v", p.v, p.lk);
    p.kv_len = h.input_strided("kv_len", p.kv_len, size_t(p.kv_len_bytes), {p.batch, 1}, {p.kv_len_stride, 1},
                               size_t(p.kv_len_bytes));
    const size_t elements = size_t(p.batch) * p.lq * p.places * p.heads * p.dim;
    p.out.data = h.output_bytes("out", const_cast<void*>(p.out.data), elements * elem);
    const int code = cuda_short_attention(p, nullptr);
    h.finish();
    return code;
  });
}

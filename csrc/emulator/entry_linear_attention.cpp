// Linear attention's state and readout, through the host entries that the CUDA operators call.
#include "emulator/harness.h"
#include "kernels/linear/linear_attention.h"

using namespace vdit;

namespace {

size_t element_bytes(DType type) { return type == DType::f32 ? 4 : 2; }

TokenRows guarded(emu::Harness& h, const char* name, const TokenRows& rows, const std::vector<int64_t>& sizes,
                  DType dtype) {
  TokenRows copy = rows;
  const bool aligned = reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  copy.data =
      h.input_strided(name, rows.data, element_bytes(dtype), sizes,
                      {rows.batch_stride, rows.row_stride, rows.head_stride, 1}, aligned ? 16 : element_bytes(dtype));
  return copy;
}

LinearWeight guarded(emu::Harness& h, const LinearWeight& w, int64_t heads, int64_t dim) {
  LinearWeight copy = w;
  copy.data = h.input_strided("weight", w.data, element_bytes(w.dtype), {w.head_stride == 0 ? 1 : heads, dim, dim},
                              {w.head_stride, w.row_stride, 1}, element_bytes(w.dtype));
  return copy;
}

}  // namespace

VDIT_EMU_EXPORT size_t vdit_emu_linear_state_params_bytes() { return sizeof(LinearStateParams); }
VDIT_EMU_EXPORT size_t vdit_emu_linear_readout_params_bytes() { return sizeof(LinearReadoutParams); }

// splits 0: as many as for a GPU of `processors` multiprocessors.
VDIT_EMU_EXPORT int vdit_emu_linear_state(const LinearStateParams* params, int32_t splits, int32_t processors,
                                          const emu::Policy* policy, char* error, size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    LinearStateParams p = *params;
    if (splits == 0) splits = linear_state_splits(p, processors);
    p.k = guarded(h, "k", p.k, {p.batch, p.length, p.heads, p.dim}, p.dtype);
    p.v = guarded(h, "v", p.v, {p.batch, p.length, p.heads, p.dim_v}, p.dtype);
    p.k_den = guarded(h, "k_den", p.k_den, {p.batch, p.length, p.heads, p.dim}, p.dtype);
    p.weight = guarded(h, p.weight, p.heads, p.dim);
    p.kv_len.data = h.input_strided("kv_len", p.kv_len.data, size_t(p.kv_len.bytes), {p.batch, 1},
                                    {p.kv_len.batch_stride, 1}, size_t(p.kv_len.bytes));
    const size_t floats = size_t(p.batch) * p.heads * feature_count(p.map, p.dim) * (p.dim_v + 1);
    p.state = h.output("state", p.state, floats);
    auto* workspace = static_cast<float*>(h.scratch("workspace", linear_state_workspace(p, splits) * 4));
    const int code = cuda_linear_state(p, splits, workspace, nullptr);
    h.finish();
    return code;
  });
}

VDIT_EMU_EXPORT int vdit_emu_linear_readout(const LinearReadoutParams* params, int32_t processors,
                                            const emu::Policy* policy, char* error, size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    LinearReadoutParams p = *params;
    p.q = guarded(h, "q", p.q, {p.batch, p.length, p.heads, p.dim}, p.dtype);
    p.q_den = guarded(h, "q_den", p.q_den, {p.batch, p.length, p.heads, p.dim}, p.dtype);
    p.weight = guarded(h, p.weight, p.heads, p.dim);
    const size_t floats = size_t(p.batch) * p.kv_heads * feature_count(p.map, p.dim) * (p.dim_v + 1);
    p.state = h.input("state", p.state, floats);
    const size_t elements = size_t(p.batch) * p.length * p.heads * p.dim_v;
    p.out = h.output_bytes("out", p.out, elements * element_bytes(p.dtype));
    const int code = cuda_linear_readout(p, processors, nullptr);
    h.finish();
    return code;
  });
}

// The gradients of attention, through the host entry that the CUDA operator calls.
#include "emulator/attention_arguments.h"
#include "kernels/attention/backward.h"

using namespace vdit::gpu;

VDIT_EMU_EXPORT size_t vdit_emu_backward_params_bytes() { return sizeof(BackwardParams); }
VDIT_EMU_EXPORT size_t vdit_emu_backward_outputs_bytes() { return sizeof(BackwardOutputs); }

VDIT_EMU_EXPORT int vdit_emu_attention_backward(const BackwardParams* params, const BackwardOutputs* outputs,
                                                const emu::Policy* policy, char* error, size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    BackwardParams p = *params;
    AttentionParams& f = p.forward;
    f = guarded_params(h, params->forward);
    const size_t elem = element_bytes(f.dtype), rows = size_t(f.batch) * f.heads * f.lq;
    p.dout = guarded_rows(h, "dout", p.dout, f.batch, f.lq, f.heads, f.dim, elem);
    p.out = guarded_rows(h, "out", p.out, f.batch, f.lq, f.heads, f.dim, elem);
    p.lse = h.input("lse", p.lse, rows);
    p.dlse = h.input("dlse", p.dlse, rows);
    BackwardOutputs out = *outputs;
    const size_t key = size_t(f.kv_heads) * f.dim * elem;  // bytes of all heads of a key
    out.dq = h.output_bytes("dq", out.dq, rows * f.dim * elem);
    out.dk = h.output_bytes("dk", out.dk, f.batch * f.lk * key);
    out.dv = h.output_bytes("dv", out.dv, f.batch * f.lk * key);
    for (int i = 0; i < f.num_segments; ++i) {
      const size_t bytes = size_t(out.segment_batch[i]) * f.segment[i].length * key;
      out.segment_dk[i] = h.output_bytes("segment dk", out.segment_dk[i], bytes);
      out.segment_dv[i] = h.output_bytes("segment dv", out.segment_dv[i], bytes);
    }
    const size_t bytes = attention_backward_workspace_bytes(p);
    void* const workspace = bytes ? h.scratch("workspace", bytes) : nullptr;
    const int code = attention_backward(p, out, workspace, bytes, nullptr);
    h.finish();
    return code;
  });
}

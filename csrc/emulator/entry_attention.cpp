// The attention kernels, through the host entry that the CUDA operator calls.
#include "emulator/attention_arguments.h"
#include "kernels/attention/forward.h"

using namespace vdit::gpu;

VDIT_EMU_EXPORT size_t vdit_emu_attention_params_bytes() { return sizeof(AttentionParams); }
VDIT_EMU_EXPORT size_t vdit_emu_forward_options_bytes() { return sizeof(ForwardOptions); }

VDIT_EMU_EXPORT int vdit_emu_attention(const AttentionParams* params, const AttentionOutputs* outputs,
                                       const emu::Policy* policy, const ForwardOptions* options, char* error,
                                       size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    const AttentionParams p = guarded_params(h, *params);
    const size_t rows = size_t(p.batch) * p.heads * p.lq;
    AttentionOutputs out;
    out.out = h.output_bytes("out", outputs->out, rows * p.dim * element_bytes(p.dtype));
    out.lse = h.output("lse", outputs->lse, rows);
    const size_t bytes = attention_workspace_bytes(p, *options);
    void* const workspace = bytes ? h.scratch("workspace", bytes) : nullptr;
    const int code = attention_forward(p, out, workspace, bytes, nullptr, *options);
    h.finish();
    return code;
  });
}

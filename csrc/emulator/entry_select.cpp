// The selection kernels, through the host entry that the CUDA operators call.
#include "emulator/harness.h"
#include "kernels/select/select.h"

using namespace vdit;

VDIT_EMU_EXPORT size_t vdit_emu_select_params_bytes() { return sizeof(SelectParams); }

VDIT_EMU_EXPORT int vdit_emu_select(const SelectParams* params, const emu::Policy* policy, char* error,
                                    size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    SelectParams p = *params;
    const auto rows = size_t(p.rows), entries = rows * size_t(p.n);
    p.scores = h.input("scores", p.scores, entries);
    p.k_rows = h.input_bytes("k_rows", p.k_rows, rows * size_t(p.k_bytes), 4);
    p.keep = h.output("keep", p.keep, entries);
    const int code = cuda_select(p, nullptr);
    h.finish();
    return code;
  });
}

// Rows added up by weight, through the host entry that the CUDA operator calls.
#include "emulator/harness.h"
#include "kernels/fused/combine_rows.h"

using namespace vdit;

VDIT_EMU_EXPORT size_t vdit_emu_combine_rows_params_bytes() { return sizeof(CombineRowsParams); }

VDIT_EMU_EXPORT int vdit_emu_combine_rows(const CombineRowsParams* params, const emu::Policy* policy, char* error,
                                          size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    CombineRowsParams p = *params;
    const size_t element = p.dtype == DType::f32 ? 4 : 2, slots = size_t(p.rows) * size_t(p.slots_per_row);
    const auto matrix = [&](const char* name, const void* data, int64_t count, int64_t stride) {
      const size_t align = reinterpret_cast<uintptr_t>(data) % 16 == 0 ? 16 : element;
      return h.input_strided(name, data, element, {count, p.dim}, {stride, 1}, align);
    };
    p.source = matrix("rows", p.source, p.sources, p.source_stride);
    p.base = matrix("base", p.base, p.rows, p.base_stride);
    p.residual = matrix("residual", p.residual, p.rows, p.residual_stride);
    p.gate = matrix("gate", p.gate, (p.rows + p.rows_per_gate - 1) / p.rows_per_gate, p.gate_stride);
    p.slots = h.input("slots", p.slots, slots);
    p.weights = h.input("weights", p.weights, slots);
    p.out = h.output_bytes("out", p.out, size_t(p.rows) * size_t(p.dim) * element);
    const int code = cuda_combine_rows(p, nullptr);
    h.finish();
    return code;
  });
}

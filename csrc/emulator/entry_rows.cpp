// gather_rows and scatter_rows, through the host entries that the CUDA operators call.
#include "emulator/harness.h"
#include "kernels/rows/rows.h"

using namespace vdit;

namespace {

// A [B, n, row] tensor in guarded memory, strides in bytes as in RowPair.
void* guarded(emu::Harness& h, const char* name, const void* data, int64_t batch, int64_t rows, int64_t batch_stride,
              int64_t row_stride, int64_t row_bytes) {
  const size_t align = emu::alignment(data);
  return const_cast<void*>(
      h.input_strided(name, data, 1, {batch, rows, row_bytes}, {batch_stride, row_stride, 1}, align));
}

int run(const RowsParams* params, const emu::Policy* policy, char* error, size_t error_bytes, bool gather) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    RowsParams p = *params;
    const int64_t lists = p.rows_batch == 0 ? 1 : p.batch, counts = p.count_batch == 0 ? 1 : p.batch;
    p.rows = static_cast<const int32_t*>(
        h.input_strided("rows", p.rows, 4, {lists, p.slots, 1}, {p.rows_batch, p.rows_slot, 1}, 4));
    p.count = static_cast<const int32_t*>(h.input_strided("count", p.count, 4, {counts, 1}, {p.count_batch, 1}, 4));
    if (p.gate.data != nullptr) {
      const size_t size = p.gate.dtype == DType::f32 ? 4 : 2, width = p.dtype == DType::f32 ? 4 : 2;
      const int64_t batch = p.gate.batch == 0 ? 1 : p.batch, slots = p.gate.slot == 0 ? 1 : p.slots;
      const int64_t channels = p.gate.channel == 0 ? 1 : p.pair[0].row_bytes / int64_t(width);
      p.gate.data = h.input_strided("gate", p.gate.data, size, {batch, slots, channels}, {p.gate.batch, p.gate.slot, 1},
                                    emu::alignment(p.gate.data));
    }
    for (int i = 0; i < p.pairs; ++i) {
      RowPair& t = p.pair[i];
      if (gather) {
        t.full = guarded(h, "full", t.full, p.batch, p.tokens, t.full_batch, t.full_row, t.row_bytes);
        t.part = h.output_bytes("part", t.part, size_t(p.batch) * p.slots * t.row_bytes);
      } else {
        t.part = guarded(h, "part", t.part, p.batch, p.slots, t.part_batch, t.part_row, t.row_bytes);
        t.full = h.inout_bytes("full", t.full, size_t(p.batch) * p.tokens * t.row_bytes);
      }
    }
    const int code = gather ? cuda_gather_rows(p, nullptr) : cuda_scatter_rows(p, nullptr);
    h.finish();
    return code;
  });
}

}  // namespace

VDIT_EMU_EXPORT size_t vdit_emu_rows_params_bytes() { return sizeof(RowsParams); }

VDIT_EMU_EXPORT int vdit_emu_gather_rows(const RowsParams* params, const emu::Policy* policy, char* error,
                                         size_t error_bytes) {
  return run(params, policy, error, error_bytes, true);
}

VDIT_EMU_EXPORT int vdit_emu_scatter_rows(const RowsParams* params, const emu::Policy* policy, char* error,
                                          size_t error_bytes) {
  return run(params, policy, error, error_bytes, false);
}

// pack_slices and unpack_slices, through the host entries that the CUDA operators call.
#include "emulator/harness.h"
#include "kernels/pack/pack.h"

using namespace vdit;

namespace {

// A tensor in guarded memory: inputs as they lie, results contiguous.
char* guarded(emu::Harness& h, const PackParams& p, const PackTensor& t, bool pack) {
  const int64_t sizes[] = {p.batch, t.rows, t.heads, t.dim};
  if (!pack) {
    const int64_t elements = sizes[0] * sizes[1] * sizes[2] * sizes[3];
    return static_cast<char*>(h.output_bytes("x", t.data, size_t(elements * p.element)));
  }
  return static_cast<char*>(
      const_cast<void*>(h.input_strided("x", t.data, 1, {sizes[0], sizes[1], sizes[2], sizes[3], p.element},
                                        {t.batch, t.row, t.head, t.channel, 1}, emu::alignment(t.data))));
}

int run(const PackParams* params, int64_t bytes, const emu::Policy* policy, char* error, size_t error_bytes,
        bool pack) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    PackParams p = *params;
    for (int32_t i = 0; i < p.tensors; ++i) p.tensor[i].data = guarded(h, p, p.tensor[i], pack);
    p.buffer = static_cast<char*>(
        pack ? h.output_bytes("buffer", p.buffer, size_t(bytes), emu::alignment(p.buffer))
             : const_cast<void*>(h.input_bytes("buffer", p.buffer, size_t(bytes), emu::alignment(p.buffer))));
    const int code = pack ? cuda_pack_slices(p, nullptr) : cuda_unpack_slices(p, nullptr);
    h.finish();
    return code;
  });
}

}  // namespace

VDIT_EMU_EXPORT size_t vdit_emu_pack_params_bytes() { return sizeof(PackParams); }

VDIT_EMU_EXPORT int vdit_emu_pack_slices(const PackParams* params, int64_t bytes, const emu::Policy* policy,
                                         char* error, size_t error_bytes) {
  return run(params, bytes, policy, error, error_bytes, true);
}

VDIT_EMU_EXPORT int vdit_emu_unpack_slices(const PackParams* params, int64_t bytes, const emu::Policy* policy,
                                           char* error, size_t error_bytes) {
  return run(params, bytes, policy, error, error_bytes, false);
}

// The adaptive norms, through the host entry that the CUDA operators call.
#include "emulator/harness.h"
#include "kernels/fused/adaln.h"

using namespace vdit;

namespace {

size_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// What the original promises of its first byte.
size_t align_of(const void* p, size_t element) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 ? 16 : element; }

struct Inputs {
  emu::Harness& h;
  const AdaLNParams& p;

  const void* vector(const char* name, const void* source, DType dtype) {
    return h.input_bytes(name, source, size_t(p.dim) * bytes_of(dtype), align_of(source, bytes_of(dtype)));
  }
  void rows(const char* name, AdaLNRows& x) {
    x.data = h.input_strided(name, x.data, bytes_of(x.dtype), {p.batch, p.tokens, p.dim},
                             {x.batch_stride, x.token_stride, 1}, align_of(x.data, bytes_of(x.dtype)));
  }
  void table(const char* name, AdaLNTable& t) {
    const size_t element = bytes_of(p.row_dtype);
    t.data = h.input_strided(name, t.data, element, {p.batch, t.rows, p.dim}, {t.batch_stride, t.row_stride, 1},
                             align_of(t.data, element));
    t.base = vector("base", t.base, p.base_dtype);
  }
  void norm(AdaLNNorm& n) {
    n.weight = vector("weight", n.weight, n.dtype);
    n.bias = vector("bias", n.bias, n.dtype);
  }
};

}  // namespace

VDIT_EMU_EXPORT size_t vdit_emu_adaln_params_bytes() { return sizeof(AdaLNParams); }

VDIT_EMU_EXPORT int vdit_emu_adaln(const AdaLNParams* params, int processors, const emu::Policy* policy, char* error,
                                   size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    AdaLNParams p = *params;
    Inputs in{h, *params};
    in.rows("x", p.x);
    in.rows("y", p.y);
    in.table("gate", p.gate);
    in.table("scale", p.scale);
    in.table("shift", p.shift);
    in.norm(p.norm);
    in.norm(p.post);
    if (p.index != nullptr)
      p.index = static_cast<const int32_t*>(
          h.input_strided("index", p.index, 4, {p.batch, p.tokens, 1}, {p.index_batch_stride, p.index_stride, 1}, 4));
    const size_t bytes = size_t(p.batch * p.tokens * p.dim) * bytes_of(p.x.dtype);
    p.x_new = h.output_bytes("x_new", p.x_new, bytes);
    p.h = h.output_bytes("h", p.h, bytes);
    const int code = cuda_adaln(p, processors, nullptr);
    h.finish();
    return code;
  });
}

// The feature cache's kernels, through the host entries that the CUDA operators call.
#include "emulator/harness.h"
#include "kernels/cache/cache.h"

using namespace vdit;

namespace {

size_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// What the original promises of its first byte.
size_t align_of(const void* p, size_t element) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 ? 16 : element; }

// Inputs by what the kernels may read of them: rows of a walk whose last one is cut are copied up to that.
template <class Params>
struct Inputs {
  emu::Harness& h;
  const Params& p;

  bool flat() const { return p.total < p.batch * p.tokens * p.dim || p.batch * p.tokens == 1; }

  void rows(const char* name, AdaLNRows& x) {
    const size_t element = bytes_of(x.dtype);
    if (flat())
      x.data = h.input_bytes(name, x.data, size_t(p.total) * element, align_of(x.data, element));
    else
      x.data = h.input_strided(name, x.data, element, {p.batch, p.tokens, p.dim}, {x.batch_stride, x.token_stride, 1},
                               align_of(x.data, element));
  }
  void factors(ForecastModule& m) {
    const size_t element = m.scales != nullptr ? 1 : bytes_of(p.factor_dtype);
    m.factors = h.input_strided("factors", m.factors, element, {p.factors, p.total}, {m.factor_stride, 1},
                                align_of(m.factors, element));
    m.scales = static_cast<const float*>(
        h.input_strided("scales", m.scales, 4, {p.factors, p.batch * p.tokens}, {m.scale_stride, 1}, 4));
  }
  void table(const char* name, AdaLNTable& t) {
    const size_t element = bytes_of(p.row_dtype), base = bytes_of(p.base_dtype);
    t.data = h.input_strided(name, t.data, element, {p.batch, t.rows, p.dim}, {t.batch_stride, t.row_stride, 1},
                             align_of(t.data, element));
    t.base = h.input_bytes("base", t.base, size_t(p.dim) * base, align_of(t.base, base));
  }
};

}  // namespace

VDIT_EMU_EXPORT size_t vdit_emu_factor_update_params_bytes() { return sizeof(FactorUpdateParams); }
VDIT_EMU_EXPORT size_t vdit_emu_forecast_params_bytes() { return sizeof(ForecastParams); }

// `held`: factors in the buffer, of which those that are not written must stay as they are.
VDIT_EMU_EXPORT int vdit_emu_factor_update(const FactorUpdateParams* params, int held, const emu::Policy* policy,
                                           char* error, size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    FactorUpdateParams p = *params;
    Inputs<FactorUpdateParams> in{h, *params};
    in.rows("output", p.output);
    in.rows("minus", p.minus);
    const size_t element = p.scales != nullptr ? 1 : bytes_of(p.factor_dtype);
    const auto bytes = size_t((held - 1) * p.factor_stride + p.total) * element;
    p.factors = h.inout_bytes("factors", p.factors, bytes, align_of(p.factors, element));
    const auto scales = size_t((held - 1) * p.scale_stride + p.batch * p.tokens) * sizeof(float);
    p.scales = static_cast<float*>(h.inout_bytes("scales", p.scales, scales, 4));
    const int code = cuda_factor_update(p, nullptr);
    h.finish();
    return code;
  });
}

// `out_bytes`: from the first to the last element of out. Out may be x, which is then not copied apart.
VDIT_EMU_EXPORT int vdit_emu_forecast_gate_add(const ForecastParams* params, int64_t out_bytes,
                                               const emu::Policy* policy, char* error, size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    ForecastParams p = *params;
    Inputs<ForecastParams> in{h, *params};
    p.out = h.inout_bytes("out", p.out, size_t(out_bytes), align_of(p.out, bytes_of(p.out_dtype)));
    if (p.x.data == params->out)
      p.x.data = p.out;
    else
      in.rows("x", p.x);
    for (int j = 0; j < p.modules; ++j) {
      ForecastModule& m = p.module[j];
      in.factors(m);
      in.table("gate", m.gate);
    }
    if (p.index != nullptr)
      p.index = static_cast<const int32_t*>(
          h.input_strided("index", p.index, 4, {p.batch, p.tokens, 1}, {p.index_batch_stride, p.index_stride, 1}, 4));
    const int code = cuda_forecast_gate_add(p, nullptr);
    h.finish();
    return code;
  });
}

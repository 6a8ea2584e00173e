// The search passes over scores, through the host entries that the CUDA operators call.
#include <vector>

#include "emulator/attention_arguments.h"
#include "kernels/select/block_mass.h"

using namespace vdit::gpu;

namespace {

ScoreParams guarded_scores(Harness& h, const ScoreParams& from) {
  ScoreParams p = from;
  const size_t elem = element_bytes(p.dtype);
  p.q = guarded_rows(h, "q", from.q, p.batch, p.lq, p.heads, p.dim, elem);
  p.k = guarded_rows(h, "k", from.k, p.batch, p.lk, p.kv_heads, p.dim, elem);
  p.q_len.of = h.input_bytes("q_len", from.q_len.of, size_t(p.batch) * p.q_len.bytes, 8);
  p.kv_len.of = h.input_bytes("kv_len", from.kv_len.of, size_t(p.batch) * p.kv_len.bytes, 8);
  return p;
}

size_t folded(int32_t rows, int32_t fold) { return fold > 0 ? (size_t(rows) + fold - 1) / fold : 0; }

}  // namespace

VDIT_EMU_EXPORT size_t vdit_emu_score_params_bytes() { return sizeof(ScoreParams); }

VDIT_EMU_EXPORT int vdit_emu_score_lse(const ScoreParams* params, float* lse, const emu::Policy* policy, char* error,
                                       size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    const ScoreParams p = guarded_scores(h, *params);
    float* const out = h.output("lse", lse, size_t(p.batch) * p.heads * folded(p.lq, p.fold));
    const int code = score_lse(p, out, nullptr);
    h.finish();
    return code;
  });
}

VDIT_EMU_EXPORT int vdit_emu_block_mass(const ScoreParams* params, const float* lse, int64_t q_block, int64_t kv_block,
                                        float* mass, size_t elements, const emu::Policy* policy, char* error,
                                        size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    const ScoreParams p = guarded_scores(h, *params);
    const float* const rows = h.input("lse", lse, size_t(p.batch) * p.heads * folded(p.lq, p.fold));
    const int code = block_mass(p, rows, q_block, kv_block, h.output("mass", mass, elements), nullptr);
    h.finish();
    return code;
  });
}

VDIT_EMU_EXPORT int vdit_emu_softmax_mass(const ScoreParams* params, int64_t q_block, int64_t kv_block, float* mass,
                                          size_t elements, const emu::Policy* policy, char* error, size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    const ScoreParams p = guarded_scores(h, *params);
    const size_t rows = size_t(p.batch) * p.heads * folded(p.lq, p.fold);
    std::vector<float> lse(rows);
    float* const scratch = h.output("lse", lse.data(), rows);
    const int code = softmax_mass(p, q_block, kv_block, scratch, h.output("mass", mass, elements), nullptr);
    h.finish();
    return code;
  });
}

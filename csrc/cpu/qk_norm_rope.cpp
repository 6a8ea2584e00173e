#include "cpu/qk_norm_rope.h"

#include <algorithm>
#include <vector>

#include "cpu/features.h"

#define VDIT_DECLARE(ns)                                                                              \
  namespace ns {                                                                                      \
  int32_t qk_norm_rope(const vdit::QkNormRopeParams& p, int64_t first, int64_t last, float* scratch); \
  }
VDIT_DECLARE(vdit_generic)
#if defined(VDIT_X86)
VDIT_DECLARE(vdit_avx2)
VDIT_DECLARE(vdit_avx512)
#endif
#undef VDIT_DECLARE

namespace vdit {

int64_t qk_norm_rope_scratch(const QkNormRopeParams& p) {
  const bool across = p.norm == QkNorm::rms_across;
  int64_t floats = 0, heads = 1;
  for (int i = 0; i < p.streams; ++i) {
    const QkStream& s = p.stream[i];
    if (s.copy != 0) continue;
    heads = std::max<int64_t>(heads, s.heads);
    floats += 2 * (across ? int64_t{s.heads} : 1) * p.dim;  // weight and bias
    floats += 2 * int64_t{p.rotary};                        // cos and sin
  }
  return floats + (across ? heads : 1) * p.dim;  // the row
}

int64_t qk_norm_rope_items(const QkNormRopeParams& p) {
  int64_t items = 0;
  for (int i = 0; i < p.streams; ++i) items = std::max(items, int64_t{p.batch} * p.stream[i].tokens);
  return items;
}

int32_t cpu_qk_norm_rope(const QkNormRopeParams& p, int64_t first, int64_t last) {
  std::vector<float> scratch(static_cast<size_t>(qk_norm_rope_scratch(p)));
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::qk_norm_rope(p, first, last, scratch.data());
    case Isa::avx2: return vdit_avx2::qk_norm_rope(p, first, last, scratch.data());
#endif
    default: return vdit_generic::qk_norm_rope(p, first, last, scratch.data());
  }
}

}  // namespace vdit

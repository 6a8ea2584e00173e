#include "cpu/short_attention.h"

#include "cpu/features.h"

namespace vdit_generic {
int64_t short_attention_scratch(const vdit::ShortAttentionParams& params);
void short_attention(const vdit::ShortAttentionParams& params, int64_t first, int64_t last, float* scratch);
}  // namespace vdit_generic
#if defined(VDIT_X86)
namespace vdit_avx2 {
int64_t short_attention_scratch(const vdit::ShortAttentionParams& params);
void short_attention(const vdit::ShortAttentionParams& params, int64_t first, int64_t last, float* scratch);
}  // namespace vdit_avx2
namespace vdit_avx512 {
int64_t short_attention_scratch(const vdit::ShortAttentionParams& params);
void short_attention(const vdit::ShortAttentionParams& params, int64_t first, int64_t last, float* scratch);
}  // namespace vdit_avx512
#endif

namespace vdit {

int64_t cpu_short_attention_scratch(const ShortAttentionParams& params) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::short_attention_scratch(params);
    case Isa::avx2: return vdit_avx2::short_attention_scratch(params);
#endif
    default: return vdit_generic::short_attention_scratch(params);
  }
}

void cpu_short_attention(const ShortAttentionParams& params, int64_t first, int64_t last, float* scratch) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::short_attention(params, first, last, scratch);
    case Isa::avx2: return vdit_avx2::short_attention(params, first, last, scratch);
#endif
    default: return vdit_generic::short_attention(params, first, last, scratch);
  }
}

}  // namespace vdit

#include "cpu/merge.h"

#include "cpu/features.h"

namespace vdit_generic {
void merge_rows(const vdit::MergeParams& params, int64_t first, int64_t last);
}
#if defined(VDIT_X86)
namespace vdit_avx2 {
void merge_rows(const vdit::MergeParams& params, int64_t first, int64_t last);
}
namespace vdit_avx512 {
void merge_rows(const vdit::MergeParams& params, int64_t first, int64_t last);
}
#endif

namespace vdit {

void cpu_merge(const MergeParams& params, int64_t first, int64_t last) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::merge_rows(params, first, last);
    case Isa::avx2: return vdit_avx2::merge_rows(params, first, last);
#endif
    default: return vdit_generic::merge_rows(params, first, last);
  }
}

}  // namespace vdit

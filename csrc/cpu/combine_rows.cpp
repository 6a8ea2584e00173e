#include "cpu/combine_rows.h"

#include "cpu/features.h"

namespace vdit_generic {
void combine_rows(const vdit::CombineRowsParams& p, int64_t first, int64_t last);
}
#if defined(VDIT_X86)
namespace vdit_avx2 {
void combine_rows(const vdit::CombineRowsParams& p, int64_t first, int64_t last);
}
namespace vdit_avx512 {
void combine_rows(const vdit::CombineRowsParams& p, int64_t first, int64_t last);
}
#endif

namespace vdit {

void cpu_combine_rows(const CombineRowsParams& params, int64_t first, int64_t last) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::combine_rows(params, first, last);
    case Isa::avx2: return vdit_avx2::combine_rows(params, first, last);
#endif
    default: return vdit_generic::combine_rows(params, first, last);
  }
}

}  // namespace vdit

#include "cpu/select.h"

#include "cpu/features.h"

namespace vdit_generic {
void select_rows(const vdit::SelectParams& params, int64_t first, int64_t last, uint32_t* buffer);
}
#if defined(VDIT_X86)
namespace vdit_avx2 {
void select_rows(const vdit::SelectParams& params, int64_t first, int64_t last, uint32_t* buffer);
}
namespace vdit_avx512 {
void select_rows(const vdit::SelectParams& params, int64_t first, int64_t last, uint32_t* buffer);
}
#endif

namespace vdit {

void cpu_select(const SelectParams& params, int64_t first, int64_t last, uint32_t* buffer) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::select_rows(params, first, last, buffer);
    case Isa::avx2: return vdit_avx2::select_rows(params, first, last, buffer);
#endif
    default: return vdit_generic::select_rows(params, first, last, buffer);
  }
}

}  // namespace vdit

#include "cpu/adaln.h"

#include "cpu/features.h"

namespace vdit_generic {
void adaln_rows(const vdit::AdaLNParams& p, int64_t first, int64_t last, float* scratch);
}
#if defined(VDIT_X86)
namespace vdit_avx2 {
void adaln_rows(const vdit::AdaLNParams& p, int64_t first, int64_t last, float* scratch);
}
namespace vdit_avx512 {
void adaln_rows(const vdit::AdaLNParams& p, int64_t first, int64_t last, float* scratch);
}
#endif

namespace vdit {

void cpu_adaln(const AdaLNParams& p, int64_t first, int64_t last, float* scratch) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::adaln_rows(p, first, last, scratch);
    case Isa::avx2: return vdit_avx2::adaln_rows(p, first, last, scratch);
#endif
    default: return vdit_generic::adaln_rows(p, first, last, scratch);
  }
}

}  // namespace vdit

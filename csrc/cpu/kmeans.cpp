#include "cpu/kmeans.h"

#include "cpu/features.h"

namespace vdit_generic {
extern const vdit::KmeansKernels kmeans_kernels;
}
#if defined(VDIT_X86)
namespace vdit_avx2 {
extern const vdit::KmeansKernels kmeans_kernels;
}
namespace vdit_avx512 {
extern const vdit::KmeansKernels kmeans_kernels;
}
#endif

namespace vdit {

const KmeansKernels& kmeans_kernels() {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::kmeans_kernels;
    case Isa::avx2: return vdit_avx2::kmeans_kernels;
#endif
    default: return vdit_generic::kmeans_kernels;
  }
}

}  // namespace vdit

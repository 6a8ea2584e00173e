// The tile kernels of the instruction set that this processor has.
#include "cpu/features.h"
#include "cpu/tile_kernels.h"

namespace vdit_generic {
extern const vdit::TileKernels kernels;
}
#if defined(VDIT_X86)
namespace vdit_avx2 {
extern const vdit::TileKernels kernels;
}
namespace vdit_avx512 {
extern const vdit::TileKernels kernels;
}
#endif

namespace vdit {

const TileKernels& tile_kernels() {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::kernels;
    case Isa::avx2: return vdit_avx2::kernels;
#endif
    default: return vdit_generic::kernels;
  }
}

}  // namespace vdit

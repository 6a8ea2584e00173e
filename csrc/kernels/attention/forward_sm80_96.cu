#include "kernels/attention/forward_sm80.h"
#include "kernels/attention/forward_sm80_launch.h"

namespace vdit::gpu::sm80 {

int launch_96(const ForwardArgs& args, void* stream) {
  return args.params.dtype == DType::bf16 ? launch_forward<arch::BF16, 96>(args, stream)
                                          : launch_forward<arch::F16, 96>(args, stream);
}

}  // namespace vdit::gpu::sm80

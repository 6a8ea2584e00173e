#include "kernels/attention/backward_dkv.h"
#include "kernels/attention/backward_dq.h"

namespace vdit::gpu::backward {

int launch_dq_96(const BackwardArgs& args, void* stream) {
  return args.params.dtype == DType::bf16 ? launch_dq<arch::BF16, 96>(args, stream)
                                          : launch_dq<arch::F16, 96>(args, stream);
}

int launch_dkv_96(const BackwardArgs& args, void* stream) {
  return args.params.dtype == DType::bf16 ? launch_dkv<arch::BF16, 96>(args, stream)
                                          : launch_dkv<arch::F16, 96>(args, stream);
}

}  // namespace vdit::gpu::backward

#include "kernels/attention/backward_dkv.h"
#include "kernels/attention/backward_dq.h"

namespace vdit::gpu::backward {

int launch_dq_128(const BackwardArgs& args, void* stream) {
  return args.params.dtype == DType::bf16 ? launch_dq<arch::BF16, 128>(args, stream)
                                          : launch_dq<arch::F16, 128>(args, stream);
}

int launch_dkv_128(const BackwardArgs& args, void* stream) {
  return args.params.dtype == DType::bf16 ? launch_dkv<arch::BF16, 128>(args, stream)
                                          : launch_dkv<arch::F16, 128>(args, stream);
}

}  // namespace vdit::gpu::backward

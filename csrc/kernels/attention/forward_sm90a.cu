// The kernel for a dtype and head dim. They are compiled in files of their own.
#include "kernels/attention/forward_sm90a.h"

namespace vdit::gpu {
namespace sm90a {

extern template int launch_forward<arch::BF16, 64>(const ForwardArgs& args, void* stream);
extern template int launch_forward<arch::BF16, 128>(const ForwardArgs& args, void* stream);
extern template int launch_forward<arch::F16, 64>(const ForwardArgs& args, void* stream);
extern template int launch_forward<arch::F16, 128>(const ForwardArgs& args, void* stream);

}  // namespace sm90a

// No tile for a head dim above 128: the portable kernel serves it.
Tile forward_tile_sm90a(const AttentionParams& params) {
  if (params.dim > 128) return {0, 0};
  return {sm90a::kRows, sm90a::kKeys};
}

int launch_forward_sm90a(const ForwardArgs& args, void* stream) {
  const bool bf16 = args.params.dtype == DType::bf16;
  if (args.params.dim <= 64) {
    return bf16 ? sm90a::launch_forward<arch::BF16, 64>(args, stream)
                : sm90a::launch_forward<arch::F16, 64>(args, stream);
  }
  return bf16 ? sm90a::launch_forward<arch::BF16, 128>(args, stream)
              : sm90a::launch_forward<arch::F16, 128>(args, stream);
}

}  // namespace vdit::gpu

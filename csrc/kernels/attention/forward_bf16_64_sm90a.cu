#include "kernels/attention/forward_sm90a.h"

namespace vdit::gpu::sm90a {

template int launch_forward<arch::BF16, 64>(const ForwardArgs& args, void* stream);

}  // namespace vdit::gpu::sm90a

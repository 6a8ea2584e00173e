// Both element types of one padded head dim, in one file each.
#pragma once
#include "kernels/attention/forward.h"

namespace vdit::gpu::sm80 {

int launch_64(const ForwardArgs& args, void* stream);
int launch_96(const ForwardArgs& args, void* stream);
int launch_128(const ForwardArgs& args, void* stream);
int launch_256(const ForwardArgs& args, void* stream);

}  // namespace vdit::gpu::sm80

#include "kernels/runtime.h"

#include <cuda_runtime.h>

namespace vdit {

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace vdit

// The few CUDA runtime calls the operators need, so that no CUDA header reaches them.
#pragma once

namespace vdit {

const char* cuda_error_text(int error);  // error: a cudaError_t

}  // namespace vdit

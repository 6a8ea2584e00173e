// The few CUDA runtime calls the operators need, so that no CUDA header reaches them.
#pragma once

namespace vdit {

const char* cuda_error_text(int error);  // error: a cudaError_t

struct DeviceLimits {
  int compute_capability;  // 10 * major + minor
  int processors;          // streaming multiprocessors
  int shared_bytes;        // dynamic shared memory a block may ask for
};

// Returns 0 or a cudaError_t. Reads attributes only: no synchronisation, allowed during graph capture.
int cuda_device_limits(int device, DeviceLimits* info);

}  // namespace vdit

#include "kernels/runtime.h"

#include <cuda_runtime.h>

namespace vdit {

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int cuda_device_limits(int device, DeviceLimits* info) {
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                {cudaDevAttrComputeCapabilityMinor, &minor},
                {cudaDevAttrMultiProcessorCount, &info->processors},
                {cudaDevAttrMaxSharedMemoryPerBlockOptin, &info->shared_bytes}};
  for (const auto& w : wanted)
    if (const cudaError_t error = cudaDeviceGetAttribute(w.value, w.attribute, device); error != cudaSuccess)
      return error;
  info->compute_capability = 10 * major + minor;
  return cudaSuccess;
}

}  // namespace vdit

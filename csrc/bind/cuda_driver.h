// Asks the CUDA driver what GPUs there are, without torch and without linking CUDA, also in CPU-only builds.
#pragma once
#include <string>
#include <vector>

namespace vdit {

struct CudaDevice {
  std::string name;
  int major = 0, minor = 0;  // compute capability
  int multiprocessors = 0;
};

struct CudaProbe {
  std::string status;      // "ok", or why no device is usable
  int driver_version = 0;  // as the driver counts: 13000 is CUDA 13.0; 0 without a driver
  std::vector<CudaDevice> devices;
};

CudaProbe probe_cuda();

}  // namespace vdit

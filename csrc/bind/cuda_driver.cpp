#include "bind/cuda_driver.h"

#include <dlfcn.h>

namespace vdit {
namespace {

// From the driver API, whose binary interface does not change. Status 0 is success everywhere.
constexpr int kAttributeMultiprocessors = 16;
constexpr int kAttributeMajor = 75;
constexpr int kAttributeMinor = 76;
constexpr int kErrorNoDevice = 100;

template <class F>
bool find(void* library, const char* name, F*& function) {
  function = reinterpret_cast<F*>(dlsym(library, name));
  return function != nullptr;
}

void list_devices(void* library, CudaProbe& probe) {
  int (*init)(unsigned) = nullptr;
  int (*version)(int*) = nullptr;
  int (*count)(int*) = nullptr;
  int (*get)(int*, int) = nullptr;
  int (*name)(char*, int, int) = nullptr;
  int (*attribute)(int*, int, int) = nullptr;
  const bool complete = find(library, "cuInit", init) && find(library, "cuDriverGetVersion", version) &&
                        find(library, "cuDeviceGetCount", count) && find(library, "cuDeviceGet", get) &&
                        find(library, "cuDeviceGetName", name) && find(library, "cuDeviceGetAttribute", attribute);
  if (!complete) {
    probe.status = "libcuda.so.1 is not a usable CUDA driver";
    return;
  }
  version(&probe.driver_version);
  const int error = init(0);
  if (error != 0) {
    probe.status =
        error == kErrorNoDevice ? "the CUDA driver sees no GPU" : "cuInit failed with error " + std::to_string(error);
    return;
  }
  int n = 0;
  count(&n);
  for (int i = 0; i < n; ++i) {
    int handle = 0;
    char text[256] = "";
    CudaDevice device;
    if (get(&handle, i) != 0) continue;
    if (name(text, sizeof text, handle) == 0) device.name = text;
    attribute(&device.major, kAttributeMajor, handle);
    attribute(&device.minor, kAttributeMinor, handle);
    attribute(&device.multiprocessors, kAttributeMultiprocessors, handle);
    probe.devices.push_back(device);
  }
  probe.status = n > 0 ? "ok" : "the CUDA driver sees no GPU";
}

}  // namespace

CudaProbe probe_cuda() {
  CudaProbe probe;
  void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) {
    probe.status = "no CUDA driver (libcuda.so.1) on this machine";
    return probe;
  }
  list_devices(library, probe);
  return probe;  // the driver stays loaded: unloading it is not safe
}

}  // namespace vdit

// vdit_fast._info: what was built and where it runs. Everything that touches tensors is an operator in csrc/ops.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>
#include <thread>

#include "bind/catalogue.h"
#include "bind/cuda_driver.h"
#include "cpu/features.h"

namespace py = pybind11;

namespace {

py::list words(const std::string& text) {
  py::list result;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) result.append(word);
  return result;
}

py::dict build_info() {
  py::dict d;
  d["version"] = VDIT_VERSION;
  d["build_type"] = VDIT_BUILD_TYPE;
  d["compiler"] = VDIT_COMPILER;
  d["torch_headers"] = VDIT_TORCH_HEADERS;
  d["torch_target"] = VDIT_TORCH_TARGET;
  d["cpu_isas"] = words(VDIT_CPU_ISAS);
  const std::string cuda = VDIT_CUDA_VERSION;
  d["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  d["cuda_targets"] = words(VDIT_CUDA_TARGETS);
  return d;
}

py::list kernel_catalogue() {
  const bool has_cuda = std::string(VDIT_CUDA_VERSION).size() > 0;
  py::list result;
  for (const vdit::KernelEntry& k : vdit::kCatalogue) {
    const bool cuda = std::string(k.device) == "cuda";
    py::dict d;
    d["op"] = k.op;
    d["device"] = k.device;
    d["variant"] = k.variant;
    d["dtypes"] = words(k.dtypes);
    d["compiled"] = !cuda || has_cuda;
    d["targets"] = words(cuda ? VDIT_CUDA_TARGETS : VDIT_CPU_ISAS);
    result.append(d);
  }
  return result;
}

py::dict device_probe() {
  vdit::CudaProbe probe;
  {
    py::gil_scoped_release nogil;  // starting the driver can take seconds
    probe = vdit::probe_cuda();
  }
  py::list devices;
  for (const vdit::CudaDevice& device : probe.devices) {
    py::dict d;
    d["name"] = device.name;
    d["capability"] = py::make_tuple(device.major, device.minor);
    d["multiprocessors"] = device.multiprocessors;
    devices.append(d);
  }
  py::dict d;
  d["cpu_isa"] = vdit::isa_name(vdit::chosen_isa());
  d["cpu_threads"] = std::thread::hardware_concurrency();
  d["cuda_status"] = probe.status;
  d["cuda_driver"] = probe.driver_version;
  d["cuda_devices"] = devices;
  return d;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.doc() = "Facts about this build of vdit_fast and about the machine it runs on.";
  m.def("build_info", &build_info, "What was compiled: versions, compiler, CPU instruction sets, CUDA targets.");
  m.def("kernel_catalogue", &kernel_catalogue, "Every kernel: operator, device, variant, dtypes, compiled, targets.");
  m.def("device_probe", &device_probe, "The CPU instruction set in use and the GPUs the CUDA driver sees.");
}

#include "ops/common.h"

#ifdef VDIT_CUDA
#include "kernels/runtime.h"
// Weak: null in a CPU build of torch, bound to libtorch_cuda.so's definition otherwise.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace vdit {

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

const char* dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    default: return "another dtype";
  }
}

std::string device_text(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

DType kernel_dtype(const Tensor& t, const std::string& what) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: fail(what, " is ", dtype_text(t.scalar_type()), "; convert it to float32, float16 or bfloat16");
  }
}

void* current_cuda_stream([[maybe_unused]] int32_t device_index) {
#ifdef VDIT_CUDA
  if (aoti_torch_get_current_cuda_stream != nullptr) {
    void* stream = nullptr;
    VDIT_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
               "torch did not give its current stream of cuda:", device_index);
    return stream;
  }
#endif
  fail("a CUDA tensor arrived, but this torch offers no CUDA stream; install a CUDA build of torch");
}

void check_cuda([[maybe_unused]] int error, [[maybe_unused]] const char* what) {
#ifdef VDIT_CUDA
  VDIT_CHECK(error == 0, what, ": CUDA error ", error, " (", cuda_error_text(error),
             "); `vdit-fast doctor` lists the GPU targets of this build");
#endif
}

void fail_without_cuda(const char* what) {
  fail(what,
       ": this build has no CUDA kernels; move the tensors to the CPU, or reinstall vdit_fast where nvcc is found");
}

}  // namespace vdit

// What every operator needs: argument checks with readable messages, dtype mapping, the current CUDA stream.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/types.h"

namespace vdit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  text << "vdit_fast: ";
  (text << ... << args);
  throw std::runtime_error(text.str());  // torch turns it into a Python RuntimeError
}

// VDIT_CHECK(condition, parts of the message...): the message names the argument, its value and the remedy.
#define VDIT_CHECK(condition, ...)               \
  do {                                           \
    if (!(condition)) ::vdit::fail(__VA_ARGS__); \
  } while (false)

std::string shape_text(const Tensor& t);   // "[2, 77, 4, 64]"
const char* dtype_text(ScalarType type);   // "float32", "bfloat16", ...
std::string device_text(const Tensor& t);  // "cpu", "cuda:0", ...
bool same_device(const Tensor& a, const Tensor& b);

// The kernels' name of a floating dtype; throws for anything but float32, float16 and bfloat16. `what` names the
// argument.
DType kernel_dtype(const Tensor& t, const std::string& what);

// The stream torch currently uses on this device, as a cudaStream_t. Throws in a torch without CUDA.
void* current_cuda_stream(int32_t device_index);

// Throws if `error` (a cudaError_t as returned by a launcher) is not 0. `what` names the operator.
void check_cuda(int error, const char* what);

// For the CUDA registrations of a build without CUDA kernels.
[[noreturn]] void fail_without_cuda(const char* what);

}  // namespace vdit

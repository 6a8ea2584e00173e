// Types shared by the CPU kernels, the CUDA kernels and the operators. No framework header may be included here.
#pragma once
#include <cstdint>

namespace vdit {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

}  // namespace vdit

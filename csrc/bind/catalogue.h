// Every kernel of the package, for `vdit_fast._info.kernel_catalogue()`. One line per kernel and device.
#pragma once

namespace vdit {

struct KernelEntry {
  const char* op;       // operator in torch.ops.vdit_fast
  const char* device;   // "cpu" or "cuda"
  const char* variant;  // "portable", or the one architecture it is written for
  const char* dtypes;   // element types, space-separated
};

constexpr KernelEntry kCatalogue[] = {
    {"attention", "cpu", "portable", "float32 float16 bfloat16"},
    {"attention", "cuda", "portable", "float16 bfloat16"},
    {"attention", "cuda", "sm_90a", "float16 bfloat16"},
    {"attention_backward", "cpu", "portable", "float32 float16 bfloat16"},
    {"attention_backward", "cuda", "portable", "float16 bfloat16"},
    {"block_mean", "cpu", "portable", "float32 float16 bfloat16"},
    {"counting_sort", "cpu", "portable", "int32"},
    {"kmeans_assign", "cpu", "portable", "float32 float16 bfloat16"},
    {"merge", "cpu", "portable", "float32 float16 bfloat16"},
    {"merge", "cuda", "portable", "float32 float16 bfloat16"},
    {"permute_tokens", "cpu", "portable", "float32 float16 bfloat16 int32 int16"},
};

}  // namespace vdit

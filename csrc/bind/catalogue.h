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
    {"block_mass", "cpu", "portable", "float32 float16 bfloat16"},
    {"block_mass", "cuda", "portable", "float16 bfloat16"},
    {"merge", "cpu", "portable", "float32 float16 bfloat16"},
    {"merge", "cuda", "portable", "float32 float16 bfloat16"},
    {"score_lse", "cpu", "portable", "float32 float16 bfloat16"},
    {"score_lse", "cuda", "portable", "float16 bfloat16"},
};

}  // namespace vdit

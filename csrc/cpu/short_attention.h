// CPU twin of kernels/short/short_attention.h.
#pragma once
#include "kernels/short/short_attention.h"

namespace vdit {

// Floats of scratch memory that one thread needs.
int64_t cpu_short_attention_scratch(const ShortAttentionParams& params);

// Sequences [first, last) of the batch * places * heads ones, numbered (b * places + s) * heads + h. Safe to call from
// many threads, each with scratch of its own.
void cpu_short_attention(const ShortAttentionParams& params, int64_t first, int64_t last, float* scratch);

}  // namespace vdit

// CPU twin of kernels/fused/qk_norm_rope.h.
#pragma once
#include "kernels/fused/qk_norm_rope.h"

namespace vdit {

enum QkProblem : int32_t { kQkFine = 0, kQkBadPosition = 1, kQkBadRow = 2 };

// Floats that the kernel of one thread needs.
int64_t qk_norm_rope_scratch(const QkNormRopeParams& p);

// Number of work items: the longest stream, in tokens of all batch items. Item i is token i of every stream that has
// it.
int64_t qk_norm_rope_items(const QkNormRopeParams& p);

// Items [first, last). Returns the QkProblems met; such tokens are not rotated, or not written. Safe to call from many
// threads.
int32_t cpu_qk_norm_rope(const QkNormRopeParams& p, int64_t first, int64_t last);

}  // namespace vdit

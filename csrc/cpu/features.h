// Which instruction set the CPU kernels use.
#pragma once

namespace vdit {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

// The best instruction set this CPU has, found once. The environment variable VDIT_CPU_ISA (generic, avx2, avx512) can
// lower it, to test the narrower kernels; a value this CPU lacks or that is unknown is ignored.
Isa chosen_isa();

// "generic", "avx2" or "avx512".
const char* isa_name(Isa isa);

}  // namespace vdit

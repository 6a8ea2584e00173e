# CPU kernels. Sets VDIT_CPU_OBJECTS, VDIT_ISAS (names) and VDIT_X86 (compile definition or empty).
#
# csrc/cpu/*.cpp      compiled once for the oldest CPU of the platform
# csrc/cpu/isa/*.cpp  compiled once per instruction set, with VDIT_NS=vdit_<isa>, VDIT_VL=<fp32 lanes>, VDIT_ISA_NAME="<isa>";
#                     everything in them lives in namespace VDIT_NS, and csrc/cpu/*.cpp picks one at run time

# Fast arithmetic that keeps inf and NaN exact, which -ffast-math does not.
set(VDIT_CPU_OPTIONS -O3 -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra)

set(VDIT_ISAS)
set(VDIT_CPU_OBJECTS)
set(VDIT_X86)
file(GLOB cpu_src CONFIGURE_DEPENDS csrc/cpu/*.cpp)
file(GLOB isa_src CONFIGURE_DEPENDS csrc/cpu/isa/*.cpp)

# Eager's rounding of every product must not be lost in a fused multiply-add.
set_source_files_properties(csrc/cpu/isa/qk_norm_rope.cpp PROPERTIES COMPILE_OPTIONS -ffp-contract=off)

function(vdit_isa name lanes)
  add_library(vdit_isa_${name} OBJECT ${isa_src})
  target_include_directories(vdit_isa_${name} PRIVATE csrc)
  target_compile_definitions(vdit_isa_${name} PRIVATE VDIT_NS=vdit_${name} VDIT_VL=${lanes} VDIT_ISA_NAME="${name}")
  target_compile_options(vdit_isa_${name} PRIVATE ${VDIT_CPU_OPTIONS} ${ARGN})
  set(VDIT_ISAS ${VDIT_ISAS} ${name} PARENT_SCOPE)
  set(VDIT_CPU_OBJECTS ${VDIT_CPU_OBJECTS} $<TARGET_OBJECTS:vdit_isa_${name}> PARENT_SCOPE)
endfunction()

vdit_isa(generic 4)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  vdit_isa(avx2 8 -mavx2 -mfma -mf16c)
  vdit_isa(avx512 16 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512)
  set(VDIT_X86 VDIT_X86)
endif()

add_library(vdit_cpu OBJECT ${cpu_src})
target_include_directories(vdit_cpu PRIVATE csrc)
target_compile_definitions(vdit_cpu PRIVATE ${VDIT_X86})
target_compile_options(vdit_cpu PRIVATE ${VDIT_CPU_OPTIONS})
list(APPEND VDIT_CPU_OBJECTS $<TARGET_OBJECTS:vdit_cpu>)

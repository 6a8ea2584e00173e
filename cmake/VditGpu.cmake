# CUDA kernels, without any framework header. Sets VDIT_GPU_OBJECTS, VDIT_GPU_LIBRARIES, VDIT_GPU_TARGETS.
#
# csrc/kernels/**/*_sm90a.cu  Hopper only (wgmma, TMA): compiled for 90a, chosen at run time by compute capability
# csrc/kernels/**/*.cu        everything else: portable, with PTX for GPUs newer than the list
set(VDIT_GPU_OBJECTS)
set(VDIT_GPU_LIBRARIES)
set(VDIT_GPU_TARGETS)
if(NOT VDIT_HAVE_CUDA)
  return()
endif()

set(fatbin_option -Xfatbin=-compress-all)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  set(fatbin_option --compress-mode=size)
endif()

function(vdit_gpu_objects name targets)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE csrc)
  target_compile_options(${name} PRIVATE --expt-relaxed-constexpr -lineinfo ${fatbin_option})
  set(launcher sh ${CMAKE_CURRENT_SOURCE_DIR}/cmake/nvcc_log.sh ${CMAKE_CUDA_COMPILER_LAUNCHER})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${targets}" CUDA_COMPILER_LAUNCHER "${launcher}")
  set(VDIT_GPU_OBJECTS ${VDIT_GPU_OBJECTS} $<TARGET_OBJECTS:${name}> PARENT_SCOPE)
  set(VDIT_GPU_TARGETS ${VDIT_GPU_TARGETS} ${targets} PARENT_SCOPE)
endfunction()

file(GLOB_RECURSE gpu_src CONFIGURE_DEPENDS csrc/kernels/*.cu)
set(hopper_src ${gpu_src})
list(FILTER hopper_src INCLUDE REGEX "_sm90a\\.cu$")
list(FILTER gpu_src EXCLUDE REGEX "_sm90a\\.cu$")
vdit_gpu_objects(vdit_gpu "${VDIT_CUDA_ARCHS}" ${gpu_src})
if(hopper_src)
  vdit_gpu_objects(vdit_gpu_sm90a "90a-real" ${hopper_src})
endif()

find_package(CUDAToolkit REQUIRED)
set(VDIT_GPU_LIBRARIES CUDA::cudart_static)

# Finds an installed torch without importing it and makes the target vdit_torch. Sets VDIT_TORCH_VERSION.
#
# find_package(Torch) is no use here: with a CUDA build of torch it demands a complete CUDA toolkit. In pip's build
# isolation sys.path is replaced but the interpreter's prefix is not, so sysconfig still leads to the user's torch.
set(VDIT_TORCH_DIR "" CACHE PATH "folder of the torch package (it holds include/ and lib/)")
set(VDIT_TORCH_TARGET "2.10") # the oldest torch the built library runs with
if(NOT VDIT_TORCH_DIR AND DEFINED ENV{VDIT_TORCH_DIR})
  set(VDIT_TORCH_DIR $ENV{VDIT_TORCH_DIR})
endif()
if(NOT VDIT_TORCH_DIR)
  execute_process(COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_torch.py
                  OUTPUT_VARIABLE VDIT_TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()

set(torch_remedy "Install torch first (a CPU build will do, also for the CUDA kernels), then run
    pip install --no-build-isolation .
or set VDIT_TORCH_DIR to the folder of a torch package")
if(NOT EXISTS "${VDIT_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "vdit_fast: building needs an installed torch >= ${VDIT_TORCH_TARGET}, found none in '${VDIT_TORCH_DIR}'. ${torch_remedy}")
endif()
set(VDIT_TORCH_VERSION unknown)
if(EXISTS "${VDIT_TORCH_DIR}/version.py")
  file(STRINGS "${VDIT_TORCH_DIR}/version.py" VDIT_TORCH_VERSION REGEX "^__version__")
  string(REGEX REPLACE ".*['\"]([^'\"]+)['\"].*" "\\1" VDIT_TORCH_VERSION "${VDIT_TORCH_VERSION}")
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_release "${VDIT_TORCH_VERSION}")
  if(torch_release VERSION_LESS VDIT_TORCH_TARGET)
    message(FATAL_ERROR "vdit_fast: torch ${VDIT_TORCH_VERSION} in ${VDIT_TORCH_DIR} is older than ${VDIT_TORCH_TARGET}. ${torch_remedy}")
  endif()
endif()
message(STATUS "vdit_fast: torch ${VDIT_TORCH_VERSION} headers from ${VDIT_TORCH_DIR}")

add_library(vdit_torch INTERFACE)
target_include_directories(vdit_torch SYSTEM INTERFACE "${VDIT_TORCH_DIR}/include")
target_compile_definitions(vdit_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000ULL)
target_compile_options(vdit_torch INTERFACE "-ffile-prefix-map=${VDIT_TORCH_DIR}/include/=")
# libtorch.so must be named as needed although nothing in it is referenced: in a CUDA build of torch it brings
# libtorch_cuda.so into the symbol scope, which is where the weak stream symbol is found.
target_link_libraries(vdit_torch INTERFACE
  "-L${VDIT_TORCH_DIR}/lib" "-Wl,--push-state,--no-as-needed" torch torch_cpu "-Wl,--pop-state")

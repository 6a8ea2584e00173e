// Small kernels that test the emulator itself: named cases with input buffers, output buffers and numbers, run from
// tests/emulator through one C entry point.
#pragma once
#include <cstdint>

#include "arch/arch.h"

namespace vdit::selftest {

constexpr int kBuffers = 4, kNumbers = 16;

struct Io {  // kernel argument; what a case does not use is null or 0
  const void* in[kBuffers];
  void* out[kBuffers];
  int64_t number[kNumbers];
};

struct IoTma {
  arch::TensorMap load, store;
  Io io;
};

template <class T>
VD_DEV const T* input(const Io& io, int i) {
  return static_cast<const T*>(io.in[i]);
}
template <class T>
VD_DEV T* output(const Io& io, int i) {
  return static_cast<T*>(io.out[i]);
}
// Dynamic shared memory, aligned to what a 128-byte swizzle wants; costs up to 1008 bytes.
VD_DEV uint32_t aligned(const unsigned char* smem) { return (arch::smem_u32(smem) + 1023) & ~1023u; }

}  // namespace vdit::selftest

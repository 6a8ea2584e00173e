// The emulator's own test kernels (csrc/emulator/selftest/primitives.*) on a GPU: the same C++ with PTX bodies.
// benchmarks/gpu/primitives.py builds this with nvcc and sends tests/emulator/test_primitives.py to it.
#include <cstdio>
#include <cstring>

#include "emulator/selftest/primitives.cpp"

namespace vdit::selftest {
namespace {

struct Buffers {
  void* host[kBuffers] = {};
  void* device[kBuffers] = {};
  size_t bytes[kBuffers] = {};
  ~Buffers() {
    for (void* p : device) cudaFree(p);
  }
};

cudaError_t upload(Buffers& b, const void* const* host, const size_t* bytes) {
  for (int i = 0; i < kBuffers; ++i) {
    if (host[i] == nullptr) continue;
    b.host[i] = const_cast<void*>(host[i]);
    b.bytes[i] = bytes[i];
    if (const cudaError_t e = cudaMalloc(&b.device[i], bytes[i] + 16)) return e;
    if (const cudaError_t e = cudaMemcpy(b.device[i], host[i], bytes[i], cudaMemcpyHostToDevice)) return e;
  }
  return cudaSuccess;
}

cudaError_t run(const Case& c, Buffers& in, Buffers& out, const int64_t* numbers) {
  Io io{};
  for (int i = 0; i < kBuffers; ++i) {
    io.in[i] = in.device[i];
    io.out[i] = out.device[i];
  }
  if (strcmp(c.name, "tma") == 0) io.in[1] = in.host[1];  // the shape, which host code reads
  memcpy(io.number, numbers, sizeof io.number);
  cudaGetLastError();
  c.run(io);
  if (const cudaError_t e = cudaGetLastError()) return e;  // of the launch
  if (const cudaError_t e = cudaDeviceSynchronize()) return e;
  for (int i = 0; i < kBuffers; ++i) {
    if (out.device[i] == nullptr) continue;
    if (const cudaError_t e = cudaMemcpy(out.host[i], out.device[i], out.bytes[i], cudaMemcpyDeviceToHost)) return e;
  }
  return cudaSuccess;
}

}  // namespace

}  // namespace vdit::selftest

using namespace vdit::selftest;

// Outputs start with their contents and are updated in place. Returns 0, or 1 and a text.
extern "C" __attribute__((visibility("default"))) int vdit_gpu_case(const char* name, const void* const* in,
                                                                    const size_t* in_bytes, void* const* out,
                                                                    const size_t* out_bytes, const int64_t* numbers,
                                                                    char* error, size_t error_bytes) {
  for (const Case* c = primitive_cases(); c->name != nullptr; ++c) {
    if (strcmp(c->name, name) != 0) continue;
    Buffers inputs, outputs;
    cudaError_t e = upload(inputs, in, in_bytes);
    if (e == cudaSuccess) e = upload(outputs, out, out_bytes);
    if (e == cudaSuccess) e = run(*c, inputs, outputs, numbers);
    if (e != cudaSuccess) snprintf(error, error_bytes, "%s: %s", name, cudaGetErrorString(e));
    return e != cudaSuccess;
  }
  snprintf(error, error_bytes, "there is no case %s", name);
  return 1;
}

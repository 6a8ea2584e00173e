// For the C entry points of emulated kernels: copies arguments into guarded memory, runs, copies results back, and
// turns whatever went wrong into a text. An entry point is
//
//   return emu::guarded_run(policy, error, error_bytes, [&] {
//     emu::Harness h;
//     Params p = ...;  p.k = h.input("k", k, bytes);  p.out = h.output("out", out, bytes);
//     const int code = kernel_entry(p, ...);
//     h.finish();
//     return code;
//   });
#pragma once
#include <cstdio>
#include <list>
#include <vector>

#include "emulator/emu.h"
#include "emulator/guarded.h"

#define VDIT_EMU_EXPORT extern "C" __attribute__((visibility("default")))

namespace emu {

// What an original promises of its first byte, up to 16.
inline size_t alignment(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data) | 16;
  return address & (~address + 1);
}

class Harness {
 public:
  // Read-only copy; null stays null. `align`: what the original promises of its first byte.
  template <class T>
  const T* input(const char* name, const T* source, size_t count, size_t align = alignof(T)) {
    if (source == nullptr) return nullptr;
    return static_cast<const T*>(input_bytes(name, source, count * sizeof(T), align));
  }
  const void* input_bytes(const char* name, const void* source, size_t bytes, size_t align = 16) {
    if (source == nullptr) return nullptr;
    Guarded& g = buffers_.emplace_back(name, bytes, align, source);
    g.fill(source);
    g.make_read_only();
    return g.data();
  }
  // A strided tensor: only what sizes and strides address is copied, everything between is NaN. Strides in elements,
  // not negative; the last dimension is contiguous.
  const void* input_strided(const char* name, const void* source, size_t elem, const std::vector<int64_t>& sizes,
                            const std::vector<int64_t>& strides, size_t align = 16) {
    if (source == nullptr) return nullptr;
    int64_t extent = 1;
    for (size_t i = 0; i < sizes.size(); ++i) extent = sizes[i] && extent ? extent + (sizes[i] - 1) * strides[i] : 0;
    Guarded& g = buffers_.emplace_back(name, size_t(extent) * elem, align, source);
    if (extent) copy_rows(g.data(), source, elem, sizes, strides, 0);
    g.make_read_only();
    return g.data();
  }
  // Filled with NaN before the run and copied back by finish().
  template <class T>
  T* output(const char* name, T* target, size_t count, size_t align = alignof(T)) {
    return static_cast<T*>(output_bytes(name, target, count * sizeof(T), align));
  }
  void* output_bytes(const char* name, void* target, size_t bytes, size_t align = 16) {
    if (target == nullptr) return nullptr;
    outputs_.push_back({&buffers_.emplace_back(name, bytes, align, target), target});
    return outputs_.back().buffer->data();
  }
  // Like output, but starts with the target's contents.
  void* inout_bytes(const char* name, void* target, size_t bytes, size_t align = 16) {
    void* data = output_bytes(name, target, bytes, align);
    if (data != nullptr) memcpy(data, target, bytes);
    return data;
  }
  // Device memory that nobody sees again.
  void* scratch(const char* name, size_t bytes, size_t align = 256) {
    return buffers_.emplace_back(name, bytes, align).data();
  }
  void finish() {
    for (const Guarded& g : buffers_) g.check_canary();
    for (const Output& o : outputs_) memcpy(o.target, o.buffer->data(), o.buffer->bytes());
  }

 private:
  struct Output {
    Guarded* buffer;
    void* target;
  };
  static void copy_rows(void* to, const void* from, size_t elem, const std::vector<int64_t>& sizes,
                        const std::vector<int64_t>& strides, size_t dim) {
    if (dim + 1 == sizes.size()) {
      memcpy(to, from, size_t(sizes[dim]) * elem);
      return;
    }
    const int64_t count = strides[dim] == 0 ? 1 : sizes[dim];  // broadcast: one copy
    for (int64_t i = 0; i < count; ++i)
      copy_rows(static_cast<char*>(to) + i * strides[dim] * int64_t(elem),
                static_cast<const char*>(from) + i * strides[dim] * int64_t(elem), elem, sizes, strides, dim + 1);
  }

  std::list<Guarded> buffers_;  // a list: addresses stay
  std::vector<Output> outputs_;
};

// Runs fn() (0 or an error code) under the policy. Returns 0, or 1 and a text in `error`.
template <class F>
int guarded_run(const Policy* run_policy, char* error, size_t error_bytes, F fn) {
  const Policy before = policy;
  policy = *run_policy;
  std::string text;
  try {
    const int code = fn();
    if (code != 0) text = "the host entry returned error code " + std::to_string(code);
  } catch (const std::exception& e) {
    text = e.what();
    if (text.empty()) text = "exception without a text";
  }
  policy = before;
  snprintf(error, error_bytes, "%s", text.c_str());
  return text.empty() ? 0 : 1;
}

}  // namespace emu

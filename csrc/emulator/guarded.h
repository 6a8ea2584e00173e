// Global memory of an emulated kernel: a copy that ends at an unmapped page, so that the first byte beyond it faults.
#pragma once
#include <cstddef>
#include <string>

namespace emu {

class Guarded {
 public:
  // Uninitialised bytes are 0xff: NaN as a float, -1 as an integer. `name` must outlive the object. `like`: with an
  // alignment below 16, the copy starts as far behind a multiple of 16 bytes as this address.
  Guarded(const char* name, size_t bytes, size_t align = 16, const void* like = nullptr);
  ~Guarded();
  Guarded(Guarded&& other) noexcept;
  Guarded(const Guarded&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  const char* name() const { return name_; }
  void fill(const void* source);  // copies bytes() bytes
  void make_read_only();          // kernels that write to it fault
  void check_canary() const;      // throws Error if bytes between the mapping's start and data() were written

 private:
  const char* name_;
  unsigned char* mapping_;
  size_t mapped_;
  unsigned char* data_;
  size_t bytes_;
};

// "3 bytes past the end of `k`", for messages about faults.
std::string describe_address(const void* address);

}  // namespace emu

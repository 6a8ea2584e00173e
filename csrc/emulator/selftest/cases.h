// The tables of cases.
#pragma once
#include "emulator/selftest/selftest.h"

namespace vdit::selftest {

struct Case {
  const char* name;
  void (*run)(const Io& io);
};

// A launch of one block.
template <void (*Kernel)(Io), int Threads, int Smem>
void one_block(const Io& io) {
  arch::launch(Kernel, dim3(1), dim3(Threads), Smem, nullptr, io);
}

// Lists that end with a null name.
const Case* primitive_cases();
const Case* misuse_cases();

}  // namespace vdit::selftest

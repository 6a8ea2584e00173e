// C entry point of the cases.
#include <cstring>
#include <initializer_list>

#include "emulator/harness.h"
#include "emulator/selftest/cases.h"

using namespace vdit::selftest;

namespace {

const Case* find_case(const char* name) {
  for (const Case* list : {primitive_cases(), misuse_cases()})
    for (const Case* c = list; c->name != nullptr; ++c)
      if (strcmp(c->name, name) == 0) return c;
  return nullptr;
}

}  // namespace

// Buffers are pointers and sizes in bytes; a null pointer is an unused one.
VDIT_EMU_EXPORT int vdit_emu_case(const char* name, const void* const* in, const size_t* in_bytes, void* const* out,
                                  const size_t* out_bytes, const int64_t* numbers, const emu::Policy* policy,
                                  char* error, size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    const Case* c = find_case(name);
    if (c == nullptr) throw emu::Error(std::string("there is no case ") + name);
    emu::Harness h;
    Io io{};
    static const char* const kIn[] = {"in[0]", "in[1]", "in[2]", "in[3]"};
    static const char* const kOut[] = {"out[0]", "out[1]", "out[2]", "out[3]"};
    for (int i = 0; i < kBuffers; ++i) {
      io.in[i] = h.input_bytes(kIn[i], in[i], in_bytes[i]);
      io.out[i] = h.inout_bytes(kOut[i], out[i], out_bytes[i]);
    }
    memcpy(io.number, numbers, sizeof io.number);
    c->run(io);
    h.finish();
    return 0;
  });
}

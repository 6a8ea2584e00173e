// C entry points that every emulator library has: sizes for the binding's own check, and counters.
#include "emulator/harness.h"

VDIT_EMU_EXPORT size_t vdit_emu_policy_bytes() { return sizeof(emu::Policy); }
VDIT_EMU_EXPORT size_t vdit_emu_stats_bytes() { return sizeof(emu::Stats); }

// Counters since the last call with reset != 0.
VDIT_EMU_EXPORT void vdit_emu_stats(emu::Stats* out, int reset) {
  *out = emu::stats();
  if (reset) emu::stats() = emu::Stats{};
}

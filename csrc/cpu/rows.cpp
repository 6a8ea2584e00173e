#include "cpu/rows.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/features.h"

namespace vdit_generic {
void blend_row(const vdit::RowBlend& r);
}
#if defined(VDIT_X86)
namespace vdit_avx2 {
void blend_row(const vdit::RowBlend& r);
}
namespace vdit_avx512 {
void blend_row(const vdit::RowBlend& r);
}
#endif

namespace vdit {
namespace {

int64_t slots_in_use(const RowsParams& p, int64_t b) {
  const int64_t used = p.count != nullptr ? p.count[b * p.count_batch] : p.slots;
  return std::clamp<int64_t>(used, 0, p.slots);
}

// One row of one tensor.
struct Move {
  char *full, *part;  // full: null where no row belongs to the slot
  int64_t bytes, batch, slot;
};

// Calls visit(Move) for rows [first, last); returns whether every row was in range.
template <class Visit>
bool for_rows(const RowsParams& p, int64_t first, int64_t last, Visit visit) {
  bool in_range = true;
  for (int64_t i = first; i < last;) {
    const int64_t slot = i % p.slots, b = i / p.slots % p.batch;
    const int64_t end = std::min(last, i - slot + p.slots), used = slots_in_use(p, b);
    const RowPair& t = p.pair[i / p.slots / p.batch];
    const int32_t* rows = p.rows + b * p.rows_batch;
    char* full = static_cast<char*>(t.full) + b * t.full_batch;
    char* part = static_cast<char*>(t.part) + b * t.part_batch;
    for (int64_t s = slot; i < end; ++i, ++s) {
      Move m{nullptr, part + s * t.part_row, t.row_bytes, b, s};
      if (s < used) {
        const int32_t row = rows[s * p.rows_slot];
        if (row >= 0 && row < p.tokens) {
          m.full = full + row * t.full_row;
        } else {
          in_range = false;
        }
      }
      visit(m);
    }
  }
  return in_range;
}

}  // namespace

bool cpu_gather_rows(const RowsParams& p, int64_t first, int64_t last) {
  return for_rows(p, first, last, [](const Move& m) {
    if (m.full != nullptr) {
      std::memcpy(m.part, m.full, static_cast<size_t>(m.bytes));
    } else {
      std::memset(m.part, 0, static_cast<size_t>(m.bytes));
    }
  });
}

bool cpu_scatter_rows(const RowsParams& p, int64_t first, int64_t last) {
  if (p.add == 0 && p.gate.data == nullptr) {
    return for_rows(p, first, last, [](const Move& m) {
      if (m.full != nullptr) std::memcpy(m.full, m.part, static_cast<size_t>(m.bytes));
    });
  }
  const int64_t size = p.dtype == DType::f32 ? 4 : 2, gate_size = p.gate.dtype == DType::f32 ? 4 : 2;
  return for_rows(p, first, last, [&](const Move& m) {
    if (m.full == nullptr) return;
    const char* gate = static_cast<const char*>(p.gate.data);
    if (gate != nullptr) gate += (m.batch * p.gate.batch + m.slot * p.gate.slot) * gate_size;
    cpu_blend_row({p.dtype, m.full, m.part, m.bytes / size, p.add, gate, p.gate.dtype, p.gate.channel});
  });
}

int32_t cpu_repeated_row(const RowsParams& p, int64_t b) {
  const int64_t used = slots_in_use(p, b);
  std::vector<uint64_t> seen((static_cast<size_t>(p.tokens) + 63) / 64);
  for (int64_t slot = 0; slot < used; ++slot) {
    const int32_t row = p.rows[b * p.rows_batch + slot * p.rows_slot];
    if (row < 0 || row >= p.tokens) return kRowOutside;
    uint64_t& word = seen[static_cast<size_t>(row) / 64];
    const uint64_t bit = uint64_t{1} << row % 64;
    if ((word & bit) != 0) return row;
    word |= bit;
  }
  return -1;
}

void cpu_blend_row(const RowBlend& r) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::blend_row(r);
    case Isa::avx2: return vdit_avx2::blend_row(r);
#endif
    default: return vdit_generic::blend_row(r);
  }
}

}  // namespace vdit

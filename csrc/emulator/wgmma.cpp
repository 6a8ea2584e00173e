// wgmma: PTX ISA "Asynchronous warpgroup level matrix instructions". Modelled per warp: warp w of a warpgroup owns rows
// 16w..16w+15 of the m64 tile, and nothing keeps the four warps together, so a kernel that lets one warp speak for the
// others is caught. The four must issue the same products.
#include "emulator/internal.h"

namespace emu {

namespace {

constexpr uint32_t kPoison = 0x7fbadbad;  // a NaN

// ---- operands in shared memory: PTX ISA "Matrix descriptor format", "Strides"; checked against CuTe's layouts

struct Descriptor {
  uint32_t start, leading, stride, span;
};

Descriptor decode(uint64_t bits) {
  static constexpr uint32_t kSpan[4] = {0, 128, 64, 32};
  constexpr uint64_t kUsed = 0xC00E3FFF3FFF3FFFull;
  const Descriptor d{uint32_t(bits & 0x3fff) << 4, uint32_t(bits >> 16 & 0x3fff) << 4,
                     uint32_t(bits >> 32 & 0x3fff) << 4, kSpan[bits >> 62]};
  if (bits & ~kUsed) fail("wgmma descriptor %016llx has reserved bits set", static_cast<unsigned long long>(bits));
  if (bits >> 49 & 7) fail("wgmma descriptor: base_offset is not modelled");
  if (d.span && (d.start & ~(d.span - 1)) % (8 * d.span))
    fail("wgmma descriptor: start 0x%x is not in the first row of a %u-byte swizzle pattern", d.start, d.span);
  return d;
}

// Address of the 8 elements k = 8 * chunk .. of row (or column) `row` of a K-major operand.
uint32_t k_major(const Descriptor& d, uint32_t row, uint32_t chunk) {
  const uint32_t pitch = d.span ? d.span : 16;
  const uint32_t along_k = d.span ? chunk * 16 : chunk * d.leading;
  return swizzled(d.start + row / 8 * d.stride + row % 8 * pitch + along_k, d.span);
}

// Address of the 8 rows (or columns) 8 * chunk .. at k of an MN-major operand.
uint32_t mn_major(const Descriptor& d, uint32_t chunk, uint32_t k) {
  if (d.span == 0) return d.start + chunk * d.stride + k / 8 * d.leading + k % 8 * 16;
  const uint32_t per_span = d.span / 16;
  return swizzled(d.start + chunk / per_span * d.leading + chunk % per_span * 16 + k / 8 * d.stride + k % 8 * d.span,
                  d.span);
}

void read8(uint32_t address, float* out, int step, DT type, const char* who) {
  const unsigned char* p = smem_at(address, 16, 16, who);
  check_async_read(address, 16, who);
  for (int i = 0; i < 8; ++i) {
    uint16_t h;
    memcpy(&h, p + 2 * i, 2);
    out[i * step] = to_float(h, type);
  }
}

void read_a(const WgmmaOp& op, uint32_t warp_in_group, float (&a)[16][16]) {
  if (op.from_registers) {
    for (int lane = 0; lane < 32; ++lane) {
      if (policy.check_areg && memcmp(op.a_address[lane], op.a[lane], sizeof op.a[lane]) != 0)
        fail("registers of wgmma's A operand in lane %d changed while it was in flight", lane);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i & 1), k = 2 * (lane % 4) + 8 * (i >> 1);
        a[row][k] = to_float(uint16_t(op.a[lane][i]), op.type);
        a[row][k + 1] = to_float(uint16_t(op.a[lane][i] >> 16), op.type);
      }
    }
    return;
  }
  const Descriptor d = decode(op.desc_a);
  const uint32_t row0 = 16 * warp_in_group;
  if (op.transpose_a) {
    for (uint32_t k = 0; k < 16; ++k)
      for (uint32_t c = 0; c < 2; ++c) read8(mn_major(d, row0 / 8 + c, k), &a[8 * c][k], 16, op.type, "wgmma A");
  } else {
    for (uint32_t row = 0; row < 16; ++row)
      for (uint32_t c = 0; c < 2; ++c) read8(k_major(d, row0 + row, c), &a[row][8 * c], 1, op.type, "wgmma A");
  }
}

void read_b(const WgmmaOp& op, float* b) {  // b[16][256]
  const Descriptor d = decode(op.desc_b);
  if (op.transpose_b) {
    for (uint32_t k = 0; k < 16; ++k)
      for (int c = 0; c < op.columns / 8; ++c) read8(mn_major(d, c, k), b + k * 256 + 8 * c, 1, op.type, "wgmma B");
  } else {
    for (int n = 0; n < op.columns; ++n)
      for (uint32_t c = 0; c < 2; ++c) read8(k_major(d, n, c), b + 8 * c * 256 + n, 256, op.type, "wgmma B");
  }
}

void execute(Warp& warp, uint32_t warp_in_group, const WgmmaOp& op) {
  alignas(64) float a[16][16];
  float* const b = blk->wgmma_b.data();
  read_a(op, warp_in_group, a);
  read_b(op, b);
  float* const rows = warp.accumulators[op.accumulator].rows.data();
  const int columns = op.columns;
  for (int row = 0; row < 16; ++row) {
    float* const out = rows + row * columns;
    if (!op.accumulate) memset(out, 0, sizeof(float) * columns);
    int n = 0;
    for (; n + 32 <= columns; n += 32) {  // four independent chains
      Float8 s0 = load8(out + n), s1 = load8(out + n + 8), s2 = load8(out + n + 16), s3 = load8(out + n + 24);
      for (int k = 0; k < 16; ++k) {
        const float x = a[row][k];
        const float* column = b + k * 256 + n;
        s0 += x * load8(column);
        s1 += x * load8(column + 8);
        s2 += x * load8(column + 16);
        s3 += x * load8(column + 24);
      }
      store8(out + n, s0);
      store8(out + n + 8, s1);
      store8(out + n + 16, s2);
      store8(out + n + 24, s3);
    }
    for (; n < columns; n += 8) {
      Float8 s = load8(out + n);
      for (int k = 0; k < 16; ++k) s += a[row][k] * load8(b + k * 256 + n);
      store8(out + n, s);
    }
  }
  ++blk->stats.wgmma;
}

void execute_upto(Warp& warp, uint32_t warp_in_group, uint64_t number) {
  while (!warp.wgmmas.empty() && warp.wgmmas.front().number <= number) {
    execute(warp, warp_in_group, warp.wgmmas.front());
    warp.executed = warp.wgmmas.front().number;
    warp.wgmmas.pop();
  }
}

// ---- accumulator fragments: PTX ISA "Register fragments for wgmma.mma_async.m64nNk16". Register 4j+2h+c of a lane is
// row lane/4 + 8h, column 8j + 2(lane%4) + c.

size_t element_of(int lane, int i, int columns) {
  return size_t(lane / 4 + 8 * (i >> 1 & 1)) * columns + 8 * (i >> 2) + 2 * (lane % 4) + (i & 1);
}

void land(Accumulator& acc) {
  acc.live = false;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < acc.columns / 2; ++i) {
      uint32_t bits;
      memcpy(&bits, &acc.registers[lane][i], 4);
      if (policy.poison && bits != kPoison)
        fail("accumulator register %d of lane %d was written while a wgmma on it was in flight", i, lane);
      acc.registers[lane][i] = acc.rows[element_of(lane, i, acc.columns)];
    }
  }
}

struct Issue {
  float* d;
  int columns;
  const uint32_t* a;
  uint64_t desc_a, desc_b;
  int accumulate;
  bool transpose_a, transpose_b;
  DT type;
};

// The accumulator of these registers; taken over from them if no product on it is in flight.
int accumulator_of(Warp& warp, void** lanes) {
  const auto& first = *static_cast<Issue*>(lanes[0]);
  int free = -1;
  for (size_t i = 0; i < warp.accumulators.size(); ++i) {
    const Accumulator& acc = warp.accumulators[i];
    if (!acc.live) {
      free = int(i);
    } else if (acc.registers[0] == first.d) {
      if (acc.columns != first.columns) fail("wgmmas of different shapes on one accumulator without a wait");
      return int(i);
    }
  }
  if (free < 0) {
    free = int(warp.accumulators.size());
    warp.accumulators.emplace_back();
  }
  Accumulator& acc = warp.accumulators[free];
  acc.live = true;
  acc.columns = first.columns;
  acc.rows.resize(size_t(16) * first.columns);
  for (int lane = 0; lane < 32; ++lane) {
    acc.registers[lane] = static_cast<Issue*>(lanes[lane])->d;
    for (int i = 0; i < first.columns / 2; ++i) {
      acc.rows[element_of(lane, i, first.columns)] = acc.registers[lane][i];
      if (policy.poison) memcpy(&acc.registers[lane][i], &kPoison, 4);
    }
  }
  return free;
}

void issue(void** lanes, uint32_t) {
  Warp& warp = this_warp();
  const auto& first = *static_cast<Issue*>(lanes[0]);
  if (!warp.fenced) fail("wgmma.mma_async without a wgmma.fence since the last commit");
  for (int lane = 1; lane < 32; ++lane) {
    const auto& other = *static_cast<Issue*>(lanes[lane]);
    if (other.desc_a != first.desc_a || other.desc_b != first.desc_b || other.accumulate != first.accumulate)
      fail("the lanes of a warp give wgmma different descriptors");
  }
  decode(first.desc_b);
  if (first.a == nullptr) decode(first.desc_a);
  auto& log = blk->warpgroup_log[cur->warp / 4];
  const uint64_t number = ++warp.issued;
  if (log.size() < number)
    log.push_back({first.desc_b, first.columns});
  else if (log[number - 1].desc_b != first.desc_b || log[number - 1].columns != first.columns)
    fail("the warps of a warpgroup issue different wgmmas (number %llu)", static_cast<unsigned long long>(number));
  WgmmaOp op{};
  op.number = number;
  op.columns = first.columns;
  op.from_registers = first.a != nullptr;
  op.transpose_a = first.transpose_a;
  op.transpose_b = first.transpose_b;
  op.accumulate = first.accumulate;
  op.type = first.type;
  op.desc_a = first.desc_a;
  op.desc_b = first.desc_b;
  op.accumulator = accumulator_of(warp, lanes);
  warp.accumulators[op.accumulator].last = number;
  if (op.from_registers) {
    for (int lane = 0; lane < 32; ++lane) {
      op.a_address[lane] = static_cast<Issue*>(lanes[lane])->a;
      memcpy(op.a[lane], op.a_address[lane], sizeof op.a[lane]);
    }
  }
  warp.wgmmas.push(op);
  if (lands_now()) execute_upto(warp, cur->warp % 4, number);
}

}  // namespace

void wgmma(float* d, int columns, const uint32_t* a, uint64_t desc_a, uint64_t desc_b, int accumulate, bool transpose_a,
           bool transpose_b, DT type) {
  if (columns % 8 || columns < 8 || columns > 256) fail("wgmma: %d columns; multiples of 8 up to 256 exist", columns);
  Issue operands{d, columns, a, desc_a, desc_b, accumulate, transpose_a, transpose_b, type};
  warp_collective(a ? "wgmma with A in registers" : "wgmma with A in shared memory", ~0u, &operands, issue);
}

void wgmma_fence() {
  warp_collective("wgmma.fence", ~0u, nullptr, [](void**, uint32_t) { this_warp().fenced = true; });
}

void wgmma_commit() {
  warp_collective("wgmma.commit_group", ~0u, nullptr, [](void**, uint32_t) {
    Warp& warp = this_warp();
    warp.groups.push(warp.issued);
    warp.fenced = false;  // registers may be touched from here on, so the next product wants a fence again
  });
}

void wgmma_wait(int groups) {
  warp_collective("wgmma.wait_group", ~0u, &groups, [](void** operands, uint32_t) {
    Warp& warp = this_warp();
    const int keep = *static_cast<int*>(operands[0]);
    uint64_t upto = 0;
    while (int(warp.groups.size()) > keep) {
      upto = warp.groups.front();
      warp.groups.pop();
    }
    if (upto == 0) return;
    execute_upto(warp, cur->warp % 4, upto);
    for (auto& acc : warp.accumulators)
      if (acc.live && acc.last <= warp.executed) land(acc);
  });
}

}  // namespace emu

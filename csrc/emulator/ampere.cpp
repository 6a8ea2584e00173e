// cp.async, ldmatrix, stmatrix and mma.sync.
#include "emulator/internal.h"

namespace emu {

// ---- cp.async: PTX ISA "cp.async". Copies of a thread land in order, at its wait at the latest.

namespace {

void run_copy(CopyOp& op) {
  if (op.landed) return;
  op.landed = true;
  unsigned char* dst = blk->smem + op.dst;
  memcpy(dst, op.src, op.src_bytes);
  memset(dst + op.src_bytes, 0, op.bytes - op.src_bytes);
  copied_write(op.dst, op.bytes);
}

}  // namespace

void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t src_bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of %u bytes; 4, 8 and 16 are possible", bytes);
  if (src_bytes > bytes) fail("cp.async: src-size %u is larger than the size %u", src_bytes, bytes);
  global_at(src, bytes, "cp.async");
  smem_at(dst, bytes, bytes, "cp.async");
  ++blk->stats.cp_async;
  Thread& thread = this_thread();
  thread.copies.push({dst, src, bytes, src_bytes, false});
  ++thread.copies_issued;
  if (lands_now())
    run_copy(thread.copies[thread.copies.size() - 1]);
  else if (policy.poison)
    memset(blk->smem + dst, 0xff, bytes);
}

void cp_async_commit() { this_thread().copy_groups.push(this_thread().copies_issued); }

void land_copies(Thread& thread, uint64_t upto) {
  while (thread.copies_done < upto) {
    run_copy(thread.copies.front());
    thread.copies.pop();
    ++thread.copies_done;
  }
}

void cp_async_wait(int groups) {
  Thread& thread = this_thread();
  while (int(thread.copy_groups.size()) > groups) {
    land_copies(thread, thread.copy_groups.front());
    thread.copy_groups.pop();
  }
}

void copies_at_thread_exit() {
  const Thread& thread = this_thread();
  if (thread.copies_done < thread.copies_issued && thread.copies_promised < thread.copies_issued)
    fail("thread exits with cp.async in flight that nobody waits for");
}

// ---- ldmatrix, stmatrix: PTX ISA, 8x8 matrices of 16-bit elements. Lanes 8m..8m+7 address the rows of matrix m.

namespace {

struct LoadMatrix {
  uint32_t address;
  uint32_t* r;
};

// Rows in the same bank group (16 bytes of 128) but of different addresses cost one more cycle each.
unsigned bank_conflicts(void** lanes, int matrix) {
  unsigned worst = 1;
  for (int i = 0; i < 8; ++i) {
    unsigned same = 0;
    const uint32_t own = static_cast<LoadMatrix*>(lanes[8 * matrix + i])->address;
    for (int j = 0; j < 8; ++j) {
      const uint32_t other = static_cast<LoadMatrix*>(lanes[8 * matrix + j])->address;
      same += (own >> 4 & 7) == (other >> 4 & 7) && (i == j || own != other);
    }
    if (same > worst) worst = same;
  }
  return worst - 1;
}

template <int Matrices, bool Transpose>
void load_matrices(void** lanes, uint32_t) {
  for (int m = 0; m < Matrices; ++m) {
    const unsigned char* row[8];
    for (int i = 0; i < 8; ++i)
      row[i] = smem_at(static_cast<LoadMatrix*>(lanes[8 * m + i])->address, 16, 16, "ldmatrix");
    ++blk->stats.ldmatrix;
    blk->stats.ldmatrix_conflicts += bank_conflicts(lanes, m);
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4;
      uint32_t value;
      if (Transpose) {
        uint16_t lo, hi;
        memcpy(&lo, row[2 * pair] + 2 * group, 2);
        memcpy(&hi, row[2 * pair + 1] + 2 * group, 2);
        value = lo | uint32_t(hi) << 16;
      } else {
        memcpy(&value, row[group] + 4 * pair, 4);
      }
      static_cast<LoadMatrix*>(lanes[lane])->r[m] = value;
    }
  }
}

struct StoreMatrix {
  uint32_t address;
  const uint32_t* r;
};

template <int Matrices, bool Transpose>
void store_matrices(void** lanes, uint32_t) {
  auto row = [&](int matrix, int i) { return blk->smem + static_cast<StoreMatrix*>(lanes[8 * matrix + i])->address; };
  for (int m = 0; m < Matrices; ++m) {
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4;
      const uint32_t value = static_cast<StoreMatrix*>(lanes[lane])->r[m];
      if (Transpose) {
        const uint16_t lo = uint16_t(value), hi = uint16_t(value >> 16);
        memcpy(row(m, 2 * pair) + 2 * group, &lo, 2);
        memcpy(row(m, 2 * pair + 1) + 2 * group, &hi, 2);
      } else {
        memcpy(row(m, group) + 4 * pair, &value, 4);
      }
    }
  }
}

}  // namespace

void ldmatrix(uint32_t address, uint32_t* r, int matrices, bool transpose) {
  LoadMatrix op{address, r};
  if (matrices == 4)
    transpose ? warp_collective("ldmatrix.x4.trans", ~0u, &op, load_matrices<4, true>)
              : warp_collective("ldmatrix.x4", ~0u, &op, load_matrices<4, false>);
  else if (matrices == 2)
    transpose ? warp_collective("ldmatrix.x2.trans", ~0u, &op, load_matrices<2, true>)
              : warp_collective("ldmatrix.x2", ~0u, &op, load_matrices<2, false>);
  else
    fail("ldmatrix.x%d is not modelled", matrices);
}

void stmatrix(uint32_t address, const uint32_t* r, int matrices, bool transpose) {
  if (matrices != 4) fail("stmatrix.x%d is not modelled", matrices);
  smem_at(address, 16, 16, "stmatrix");
  generic_write(address, 16);
  StoreMatrix op{address, r};
  transpose ? warp_collective("stmatrix.x4.trans", ~0u, &op, store_matrices<4, true>)
            : warp_collective("stmatrix.x4", ~0u, &op, store_matrices<4, false>);
}

// ---- mma.m16n8k16: PTX ISA "Matrix fragments for mma.m16n8k16"

namespace {

struct Mma {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

template <DT Type>
void multiply(void** lanes, uint32_t) {
  alignas(32) float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* op = static_cast<Mma*>(lanes[lane]);
    const int group = lane / 4, pair = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = group + 8 * (i & 1), k = 2 * pair + 8 * (i >> 1);
      a[row][k] = to_float(uint16_t(op->a[i]), Type);
      a[row][k + 1] = to_float(uint16_t(op->a[i] >> 16), Type);
      c[group + 8 * (i >> 1)][2 * pair + (i & 1)] = op->c[i];
    }
    for (int i = 0; i < 2; ++i) {
      const int k = 2 * pair + 8 * i;
      b[k][group] = to_float(uint16_t(op->b[i]), Type);
      b[k + 1][group] = to_float(uint16_t(op->b[i] >> 16), Type);
    }
  }
  for (int row = 0; row < 16; row += 4) {  // four independent chains
    Float8 s0 = load8(c[row]), s1 = load8(c[row + 1]), s2 = load8(c[row + 2]), s3 = load8(c[row + 3]);
    for (int k = 0; k < 16; ++k) {
      const Float8 column = load8(b[k]);
      s0 += a[row][k] * column;
      s1 += a[row + 1][k] * column;
      s2 += a[row + 2][k] * column;
      s3 += a[row + 3][k] * column;
    }
    store8(c[row], s0);
    store8(c[row + 1], s1);
    store8(c[row + 2], s2);
    store8(c[row + 3], s3);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<Mma*>(lanes[lane])->d[i] = c[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
  ++blk->stats.mma;
}

}  // namespace

void mma_16816(float* d, const uint32_t* a, const uint32_t* b, const float* c, DT type) {
  Mma op{d, a, b, c};
  type == DT::BF16 ? warp_collective("mma.m16n8k16.bf16", ~0u, &op, multiply<DT::BF16>)
                   : warp_collective("mma.m16n8k16.f16", ~0u, &op, multiply<DT::F16>);
}

}  // namespace emu

// One kernel per group of primitives. Results are compared with plain indexing in tests/emulator/test_primitives.py.
#pragma once
#include "emulator/selftest/selftest.h"

namespace vdit::selftest {

// in: floats x, floats y. out: ex2(x), lg2(y), packed bf16 and f16 of (x, y), and what unpacking gives back.
VD_KERNEL(128, 1) numbers(const VD_GRID_CONST Io io) {
  const int n = int(io.number[0]);
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float x = input<float>(io, 0)[i], y = input<float>(io, 1)[i];
    output<float>(io, 0)[i] = arch::ex2(x);
    output<float>(io, 0)[n + i] = arch::lg2(y);
    const uint32_t b = arch::pack<arch::BF16>(x, y), h = arch::pack<arch::F16>(x, y);
    output<uint32_t>(io, 1)[i] = b;
    output<uint32_t>(io, 1)[n + i] = h;
    float* back = output<float>(io, 2) + 4 * i;
    arch::unpack<arch::BF16>(b, back[0], back[1]);
    arch::unpack<arch::F16>(h, back[2], back[3]);
  }
}

// in: floats x, bytes. out: the codes of the floats, two and two; the numbers that the bytes stand for.
VD_KERNEL(128, 1) e4m3(const VD_GRID_CONST Io io) {
  const int n = int(io.number[0]);
  for (int i = 2 * int(threadIdx.x); i < n; i += 2 * int(blockDim.x)) {
    const float* x = input<float>(io, 0) + i;
    const uint8_t* code = input<uint8_t>(io, 1) + i;
    output<uint16_t>(io, 0)[i / 2] = uint16_t(arch::pack_e4m3(x[0], x[1]));
    arch::unpack_e4m3(uint32_t(code[0]) | uint32_t(code[1]) << 8, output<float>(io, 1)[i], output<float>(io, 1)[i + 1]);
  }
}

// Every thread copies 24 bytes of global memory, 8 and 8 and two times 4, to the mirrored thread's place.
VD_KERNEL(64, 1) global_widths(const VD_GRID_CONST Io io) {
  const uint32_t* in = input<uint32_t>(io, 0) + threadIdx.x * 6;
  uint32_t* out = output<uint32_t>(io, 0) + (63 - threadIdx.x) * 6;
  arch::stg64(out, arch::ldg64_stream(in));
  arch::stg64(out + 2, arch::ldg64_stream_written(in + 2));
  arch::stg32(out + 4, arch::ldg32(in + 4));
  arch::stg32(out + 5, arch::ldg32(in + 5));
}

// in: words. out: their popc and highest_bit.
VD_KERNEL(128, 1) bits(const VD_GRID_CONST Io io) {
  const int n = int(io.number[0]);
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    output<int32_t>(io, 0)[i] = arch::popc(input<uint32_t>(io, 0)[i]);
    output<int32_t>(io, 0)[n + i] = arch::highest_bit(input<uint32_t>(io, 0)[i]);
  }
}

// Every thread stores 32 bytes with one width and loads those of the mirrored thread with another.
VD_KERNEL(64, 1) shared_widths(const VD_GRID_CONST Io io) {
  VD_DYN_SMEM(smem);
  const uint32_t own = arch::smem_u32(smem) + threadIdx.x * 32;
  const uint32_t mirrored = arch::smem_u32(smem) + (63 - threadIdx.x) * 32;
  const uint32_t* in = input<uint32_t>(io, 0) + threadIdx.x * 8;
  uint32_t* out = output<uint32_t>(io, 0) + threadIdx.x * 8;
  const auto store = io.number[0], load = io.number[1];
  for (int w = 0; w < 8; ++w) {
    const uint32_t a = own + 4 * w;
    if (store == 2) {
      arch::sts16(a, in[w] & 0xffff);
      arch::sts16(a + 2, in[w] >> 16);
    }
    if (store == 4) arch::sts32(a, in[w]);
    if (store == 8 && w % 2 == 0) arch::sts64(a, uint2{in[w], in[w + 1]});
    if (store == 16 && w % 4 == 0) arch::sts128(a, uint4{in[w], in[w + 1], in[w + 2], in[w + 3]});
  }
  arch::syncthreads();
  for (int w = 0; w < 8; ++w) {
    const uint32_t a = mirrored + 4 * w;
    if (load == 2) out[w] = arch::lds16(a) | arch::lds16(a + 2) << 16;
    if (load == 4) out[w] = arch::lds32(a);
    if (load == 8 && w % 2 == 0) {
      const uint2 v = arch::lds64(a);
      out[w] = v.x;
      out[w + 1] = v.y;
    }
    if (load == 16 && w % 4 == 0) arch::stg128(out + w, arch::lds128(a));
  }
}

// out: shfl_xor, shfl, ballot, elect and match of every lane; a counter.
VD_KERNEL(96, 1) collectives(const VD_GRID_CONST Io io) {
  const uint32_t value = input<uint32_t>(io, 0)[threadIdx.x];
  uint32_t* out = output<uint32_t>(io, 0) + threadIdx.x * 5;
  out[0] = arch::shfl_xor(value, int(io.number[0]));
  out[1] = arch::shfl(value, int(io.number[1]));
  out[2] = arch::vote_ballot(value % 3 == 0);
  out[3] = arch::elect_one();
  out[4] = arch::match_any(value % 5);
  arch::syncwarp();
  arch::atomic_add(output<uint32_t>(io, 1), value);
}

// in: words. Every thread adds its word to counter (word % 8); out: the value it found there, and the counters.
VD_KERNEL(96, 1) shared_counters(const VD_GRID_CONST Io io) {
  VD_SHARED(uint32_t, counter, 8);
  const uint32_t value = input<uint32_t>(io, 0)[threadIdx.x], base = arch::smem_u32(counter);
  if (threadIdx.x < 8) arch::sts32(base + 4 * threadIdx.x, 0);
  arch::syncthreads();
  output<uint32_t>(io, 0)[threadIdx.x] = arch::shared_add(base + value % 8 * 4, value);
  arch::syncthreads();
  if (threadIdx.x < 8) output<uint32_t>(io, 1)[threadIdx.x] = arch::lds32(base + 4 * threadIdx.x);
}

// Warp 0 fills a slot and arrives, warps 1 and 2 wait for it, reply on another barrier: `rounds` times.
VD_KERNEL(96, 1) named_barriers(const VD_GRID_CONST Io io) {
  VD_SHARED(uint32_t, slot, 32);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rounds = int(io.number[0]);
  const uint32_t address = arch::smem_u32(slot) + 4 * lane;
  uint32_t sum = 0;
  for (int r = 0; r < rounds; ++r) {
    if (warp == 0) {
      if (r > 0) arch::bar_sync<3, 96>();  // both readers are done
      arch::sts32(address, input<uint32_t>(io, 0)[r * 32 + lane]);
      arch::bar_arrive(2, 96);
    } else {
      arch::bar_sync(2, 96);
      sum = sum * 31 + arch::lds32(address);
      if (r + 1 < rounds) arch::bar_arrive<3, 96>();
    }
  }
  output<uint32_t>(io, 0)[threadIdx.x] = sum;
}

// Three groups of 16-byte copies with the given number of source bytes each; read back after waiting for each group.
VD_KERNEL(32, 1) copies(const VD_GRID_CONST Io io) {
  VD_DYN_SMEM(smem);
  const uint32_t base = arch::smem_u32(smem) + threadIdx.x * 16;
  const auto* in = input<unsigned char>(io, 0);
  const int32_t* bytes = input<int32_t>(io, 1);
  for (int g = 0; g < 3; ++g) {
    const int i = g * 32 + threadIdx.x;
    if (g == 1)
      arch::cp_async16(base + g * 512, in + 16 * i, bytes[i] == 16);
    else
      arch::cp_async16_zfill(base + g * 512, in + 16 * i, bytes[i]);
    arch::cp_async_commit();
  }
  uint32_t* out = output<uint32_t>(io, 0) + threadIdx.x * 4;
  arch::cp_async_wait<2>();
  arch::stg128(out, arch::lds128(base));
  arch::cp_async_wait<1>();
  arch::stg128(out + 128, arch::lds128(base + 512));
  arch::cp_async_wait<0>();
  arch::stg128(out + 256, arch::lds128(base + 1024));
}

// 32 rows of 8 elements through ldmatrix and back through stmatrix, plain or transposed.
VD_KERNEL(32, 1) matrices(const VD_GRID_CONST Io io) {
  VD_DYN_SMEM(smem);
  const uint32_t from = arch::smem_u32(smem) + threadIdx.x * 16, to = from + 512;
  arch::sts128(from, arch::ldg128(input<uint32_t>(io, 0) + threadIdx.x * 4));
  arch::syncwarp();
  uint32_t r[4];
  if (io.number[0])
    arch::ldsm4t(from, r);
  else
    arch::ldsm4(from, r);
  arch::stg128(output<uint32_t>(io, 0) + threadIdx.x * 4, uint4{r[0], r[1], r[2], r[3]});
  if (io.number[1])
    arch::stsm4t(to, r);
  else
    arch::stsm4(to, r);
  arch::syncwarp();
  arch::stg128(output<uint32_t>(io, 1) + threadIdx.x * 4, arch::lds128(to));
}

// D = A * B + D of one warp from fragments given per lane: in a[32][4], b[32][2], d[32][4].
template <class T>
VD_KERNEL(32, 1)
warp_mma(const VD_GRID_CONST Io io) {
  const uint32_t *a0 = input<uint32_t>(io, 0) + threadIdx.x * 4, *b = input<uint32_t>(io, 1) + threadIdx.x * 2;
  const uint32_t a[4] = {a0[0], a0[1], a0[2], a0[3]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = input<float>(io, 2)[threadIdx.x * 4 + i];
  arch::mma<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) output<float>(io, 0)[threadIdx.x * 4 + i] = d[i];
}

// Ring of 2 stages: warps 1.. read what warp 0 wrote. Mode 0: st.shared and arrive. Mode 1: cp.async whose completion
// arrives by itself.
VD_KERNEL(96, 1) ring(const VD_GRID_CONST Io io) {
  VD_DYN_SMEM(smem);
  VD_SHARED(uint64_t, bars, 4);
  const uint32_t stage = arch::smem_u32(smem), full = arch::smem_u32(bars), empty = full + 16;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rounds = int(io.number[0]);
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; ++s) {
      arch::mbar_init(full + 8 * s, 32);
      arch::mbar_init(empty + 8 * s, 2);
    }
    arch::fence_mbar_init();
  }
  arch::syncthreads();
  const uint32_t* in = input<uint32_t>(io, 0);
  if (warp == 0) {
    for (int r = 0; r < rounds; ++r) {
      const int s = r % 2;
      const uint32_t at = stage + 512 * s + 16 * lane;
      arch::mbar_wait(empty + 8 * s, (r / 2 & 1) ^ 1);
      if (io.number[1]) {
        arch::cp_async16(at, in + (r * 32 + lane) * 4, true);
        arch::cp_async_mbar_arrive_noinc(full + 8 * s);
      } else {
        arch::sts128(at, arch::ldg128(in + (r * 32 + lane) * 4));
        arch::mbar_arrive(full + 8 * s);
      }
    }
    return;
  }
  for (int r = 0; r < rounds; ++r) {
    const int s = r % 2;
    arch::mbar_wait(full + 8 * s, r / 2 & 1);
    const uint4 v = arch::lds128(stage + 512 * s + 16 * (31 - lane));
    arch::syncwarp();
    if (lane == 0) arch::mbar_arrive(empty + 8 * s);
    arch::stg128(output<uint32_t>(io, 0) + (((warp - 1) * rounds + r) * 32 + lane) * 4, v);
  }
}

// One box of the tensor to shared memory, out as it lies there (out 0), and the box stored elsewhere (rank 4).
VD_KERNEL(64, 1) tma(const VD_GRID_CONST IoTma p) {
  VD_DYN_SMEM(smem);
  VD_SHARED(uint64_t, bar, 1);
  const Io& io = p.io;
  const uint32_t tile = aligned(smem), b = arch::smem_u32(bar);
  const auto rank = io.number[0], bytes = io.number[1];
  const int c[4] = {int(io.number[2]), int(io.number[3]), int(io.number[4]), int(io.number[5])};
  const int to[4] = {int(io.number[6]), int(io.number[7]), int(io.number[8]), int(io.number[9])};
  if (threadIdx.x == 0) {
    arch::tma_prefetch(&p.load);
    arch::mbar_init(b, 1);
    arch::fence_mbar_init();
    arch::mbar_arrive_expect_tx(b, uint32_t(bytes));
    if (rank == 2) arch::tma_load2(tile, &p.load, b, c[0], c[1]);
    if (rank == 3) arch::tma_load3(tile, &p.load, b, c[0], c[1], c[2]);
    if (rank == 4) arch::tma_load4(tile, &p.load, b, c[0], c[1], c[2], c[3]);
  }
  arch::syncthreads();
  arch::mbar_wait(b, 0);
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
    arch::stg128(output<uint32_t>(io, 0) + 4 * i, arch::lds128(tile + 16 * i));
  if (rank != 4) return;
  arch::syncthreads();
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) arch::sts32(tile + 4 * i, arch::lds32(tile + 4 * i) + 1);
  arch::fence_proxy_async();
  arch::syncthreads();
  if (threadIdx.x == 0) {
    arch::tma_store4(&p.store, tile, to[0], to[1], to[2], to[3]);
    arch::tma_store_commit();
    arch::tma_store_wait<0>();
  }
}

// D[64][N] = A[64][32] * B[N][32]^T + D in two k16 steps. Operands come from global memory as they shall lie in shared
// memory; number: offset of B, descriptor offsets (lbo, sbo, step per k16) and swizzle of A and of B, accumulate.
template <class T, int N, int TransposeA, int TransposeB, bool Registers>
VD_KERNEL(128, 1)
warpgroup_mma(const VD_GRID_CONST Io io) {
  VD_DYN_SMEM(smem);
  const uint32_t base = aligned(smem), at_b = base + uint32_t(io.number[0]);
  const auto number = [&](int i) { return uint32_t(io.number[i]); };
  for (int i = threadIdx.x; i < io.number[9] / 16; i += 128)
    arch::sts128(base + 16 * i, arch::ldg128(input<uint32_t>(io, 0) + 4 * i));
  float d[N / 2];
  for (int i = 0; i < N / 2; ++i) d[i] = input<float>(io, 2)[threadIdx.x * (N / 2) + i];
  uint32_t a[8];
  for (int i = 0; i < 8; ++i) a[i] = Registers ? input<uint32_t>(io, 1)[threadIdx.x * 8 + i] : 0;
  arch::fence_proxy_async();
  arch::syncthreads();
  arch::fence_regs(d);
  arch::wgmma_fence();
  for (int k = 0; k < 2; ++k) {
    const int accumulate = k > 0 || io.number[10];
    const uint64_t db =
        arch::wgmma_desc(at_b + k * number(6), number(4), number(5), static_cast<arch::Swizzle>(io.number[8]));
    if constexpr (Registers) {
      arch::wgmma_rs<T, TransposeB>(d, a + 4 * k, db, accumulate);
    } else {
      const uint64_t da =
          arch::wgmma_desc(base + k * number(3), number(1), number(2), static_cast<arch::Swizzle>(io.number[7]));
      arch::wgmma_ss<T, TransposeA, TransposeB>(d, da, db, accumulate);
    }
  }
  arch::wgmma_commit();
  arch::wgmma_wait<0>();
  arch::fence_regs(d);
  for (int i = 0; i < N / 2; ++i) output<float>(io, 0)[threadIdx.x * (N / 2) + i] = d[i];
}

// Producer and two consumer warpgroups trade registers, 24 + 2 * 240 of 3 * 168.
VD_KERNEL(384, 1) registers(const VD_GRID_CONST Io io) {
  if (threadIdx.x < 128)
    arch::setmaxnreg_dec<24>();
  else
    arch::setmaxnreg_inc<240>();
  output<uint32_t>(io, 0)[threadIdx.x] = threadIdx.x / 128;
}

}  // namespace vdit::selftest

// Host bodies of the primitives for the emulator (csrc/emulator). No CUDA header is needed or allowed here.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "emulator/emu.h"

#define VD_DEV [[maybe_unused]] static inline
#define VD_METHOD inline
#define VD_STATIC_METHOD static inline
#define VD_KERNEL(threads, min_blocks) static void
#define VD_GRID_CONST
#define VD_RESTRICT __restrict__
#define VD_UNROLL
#define VD_DYN_SMEM(name) unsigned char* name = emu::dyn_smem()
// NOLINTBEGIN(bugprone-macro-parentheses): T is a type
// The address of `name`_key tells one declaration from another.
#define VD_SHARED(T, name, n)       \
  static const char name##_key = 0; \
  T(&name)[n] = *(T(*)[n])emu::static_smem(&name##_key, sizeof(T) * (n), alignof(T) < 16 ? 16 : alignof(T))
// NOLINTEND(bugprone-macro-parentheses)
#define threadIdx (emu::cur->tid)
#define blockIdx (emu::block_idx)
#define blockDim (emu::block_dim)
#define gridDim (emu::grid_dim)

namespace arch {

using bf16 = uint16_t;
using emu::TensorMap;
using stream_t = void*;
using ::uint2;
using ::uint4;

// ---- numbers

VD_DEV float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
VD_DEV uint32_t as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
VD_DEV int popc(uint32_t v) { return __builtin_popcount(v); }
VD_DEV int highest_bit(uint32_t v) { return v == 0 ? -1 : 31 - __builtin_clz(v); }
// .ftz: subnormal inputs and results are 0.
VD_DEV float mul_rn(float a, float b) {
  const volatile float product = a * b;  // never part of a fused multiply-add
  return product;
}
VD_DEV float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.f, x) : x; }
VD_DEV float ex2(float x) { return flush(exp2f(flush(x))); }
VD_DEV float lg2(float x) { return log2f(flush(x)); }
VD_DEV uint32_t pack_bf16(float lo, float hi) { return emu::to_bf16(lo) | uint32_t(emu::to_bf16(hi)) << 16; }
VD_DEV uint32_t pack_f16(float lo, float hi) { return emu::to_f16(lo) | uint32_t(emu::to_f16(hi)) << 16; }
VD_DEV void unpack_bf16(uint32_t pair, float& lo, float& hi) {
  lo = emu::from_bf16(uint16_t(pair));
  hi = emu::from_bf16(uint16_t(pair >> 16));
}
VD_DEV void unpack_f16(uint32_t pair, float& lo, float& hi) {
  lo = emu::from_f16(uint16_t(pair));
  hi = emu::from_f16(uint16_t(pair >> 16));
}

// ---- shared memory

VD_DEV uint32_t smem_u32(const void* p) { return emu::smem_u32(p); }

template <class V>
VD_DEV void store_shared(uint32_t a, const V& v) {
  memcpy(emu::smem_at(a, sizeof v, sizeof v, "st.shared"), &v, sizeof v);
  emu::generic_write(a, sizeof v);
}
template <class V>
VD_DEV V load_shared(uint32_t a) {
  V v;
  memcpy(&v, emu::smem_at(a, sizeof v, sizeof v, "ld.shared"), sizeof v);
  return v;
}
VD_DEV void sts16(uint32_t a, uint32_t v) { store_shared(a, uint16_t(v)); }
VD_DEV void sts32(uint32_t a, uint32_t v) { store_shared(a, v); }
VD_DEV void sts64(uint32_t a, uint2 v) { store_shared(a, v); }
VD_DEV void sts128(uint32_t a, uint4 v) { store_shared(a, v); }
VD_DEV uint32_t lds16(uint32_t a) { return load_shared<uint16_t>(a); }
VD_DEV uint32_t lds32(uint32_t a) { return load_shared<uint32_t>(a); }
VD_DEV uint2 lds64(uint32_t a) { return load_shared<uint2>(a); }
VD_DEV uint4 lds128(uint32_t a) { return load_shared<uint4>(a); }
VD_DEV uint32_t shared_add(uint32_t a, uint32_t v) {
  const uint32_t before = load_shared<uint32_t>(a);
  store_shared(a, before + v);
  return before;
}

// ---- global memory

VD_DEV uint4 ldg128(const void* p) {
  uint4 v;
  memcpy(&v, emu::ldg128(p), 16);
  return v;
}
VD_DEV uint4 ldg128_stream(const void* p) { return ldg128(p); }
VD_DEV uint4 ldg128_stream_written(const void* p) { return ldg128(p); }
VD_DEV uint2 ldg64_stream(const void* p) {
  uint2 v;
  memcpy(&v, emu::ldg64(p), 8);
  return v;
}
VD_DEV uint2 ldg64_stream_written(const void* p) { return ldg64_stream(p); }
VD_DEV uint32_t ldg32(const void* p) {
  uint32_t v;
  memcpy(&v, emu::ldg32(p), 4);
  return v;
}
VD_DEV void stg32(void* p, uint32_t v) { memcpy(emu::stg32(p), &v, 4); }
VD_DEV void stg64(void* p, uint2 v) { memcpy(emu::stg64(p), &v, 8); }
VD_DEV void stg128(void* p, uint4 v) { memcpy(emu::stg128(p), &v, 16); }
VD_DEV uint32_t atomic_add(uint32_t* p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }

// ---- synchronisation inside a block and a warp

VD_DEV void syncthreads() { emu::bar_sync(0, 0, "__syncthreads"); }
VD_DEV void syncwarp() { emu::warp_collective("__syncwarp", ~0u, nullptr, nullptr); }
VD_DEV void bar_sync(int id, int threads) { emu::bar_sync(id, threads, "bar.sync"); }
VD_DEV void bar_arrive(int id, int threads) { emu::bar_arrive(id, threads); }
template <int Id, int Threads>
VD_DEV void bar_sync() {
  emu::bar_sync(Id, Threads, "bar.sync");
}
template <int Id, int Threads>
VD_DEV void bar_arrive() {
  emu::bar_arrive(Id, Threads);
}

// ---- collectives of a whole warp

VD_DEV uint32_t shfl_xor(uint32_t v, int lane_mask) { return emu::shfl_xor(~0u, v, lane_mask); }
VD_DEV uint32_t shfl(uint32_t v, int lane) { return emu::shfl_idx(~0u, v, lane); }
VD_DEV uint32_t vote_ballot(bool p) { return emu::ballot(~0u, p); }
VD_DEV uint32_t match_any(uint32_t v) { return emu::match_any(~0u, v); }
VD_DEV bool elect_one() { return emu::elect_one(); }

// ---- cp.async

VD_DEV void cp_async16_zfill(uint32_t dst, const void* src, uint32_t src_bytes) {
  emu::cp_async(dst, src, 16, src_bytes);
}
VD_DEV void cp_async16(uint32_t dst, const void* src, bool ok) { emu::cp_async(dst, src, 16, ok ? 16 : 0); }
VD_DEV void cp_async_commit() { emu::cp_async_commit(); }
template <int N>
VD_DEV void cp_async_wait() {
  emu::cp_async_wait(N);
}

// ---- warp matrix instructions

VD_DEV void ldsm4(uint32_t a, uint32_t (&r)[4]) { emu::ldmatrix(a, r, 4, false); }
VD_DEV void ldsm4t(uint32_t a, uint32_t (&r)[4]) { emu::ldmatrix(a, r, 4, true); }
VD_DEV void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emu::mma_16816(d, a, b, d, emu::DT::BF16);
}
VD_DEV void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  emu::mma_16816(d, a, b, d, emu::DT::F16);
}

// ======== sm_90a

VD_DEV void stsm4(uint32_t a, const uint32_t (&r)[4]) { emu::stmatrix(a, r, 4, false); }
VD_DEV void stsm4t(uint32_t a, const uint32_t (&r)[4]) { emu::stmatrix(a, r, 4, true); }

// ---- mbarrier

VD_DEV void mbar_init(uint32_t bar, uint32_t count) { emu::mbar_init(bar, count); }
VD_DEV void fence_mbar_init() { emu::fence_mbar_init(); }
VD_DEV void mbar_arrive(uint32_t bar) { emu::mbar_arrive(bar, 1); }
VD_DEV void mbar_arrive_tx(uint32_t bar, uint32_t bytes) {
  emu::mbar_expect_tx(bar, bytes);
  emu::mbar_arrive(bar, 1);
}
VD_DEV void mbar_wait(uint32_t bar, uint32_t parity) { emu::mbar_wait(bar, parity); }
VD_DEV void cp_async_mbar_arrive_noinc(uint32_t bar) { emu::cp_async_mbar_arrive_noinc(bar); }
VD_DEV void fence_proxy_async() { emu::fence_proxy_async(); }

// ---- TMA

VD_DEV void tma_prefetch(const TensorMap*) {}
VD_DEV void tma_load2(uint32_t dst, const TensorMap* map, uint32_t bar, int c0, int c1) {
  const int32_t c[] = {c0, c1};
  emu::tma_load(dst, map, bar, c, 2);
}
VD_DEV void tma_load3(uint32_t dst, const TensorMap* map, uint32_t bar, int c0, int c1, int c2) {
  const int32_t c[] = {c0, c1, c2};
  emu::tma_load(dst, map, bar, c, 3);
}
VD_DEV void tma_load4(uint32_t dst, const TensorMap* map, uint32_t bar, int c0, int c1, int c2, int c3) {
  const int32_t c[] = {c0, c1, c2, c3};
  emu::tma_load(dst, map, bar, c, 4);
}
VD_DEV void tma_store4(const TensorMap* map, uint32_t src, int c0, int c1, int c2, int c3) {
  const int32_t c[] = {c0, c1, c2, c3};
  emu::tma_store(map, src, c, 4);
}
VD_DEV void tma_store_commit() { emu::tma_store_commit(); }
template <int N>
VD_DEV void tma_store_wait() {
  emu::tma_store_wait(N);
}

// ---- wgmma

VD_DEV void wgmma_fence() { emu::wgmma_fence(); }
VD_DEV void wgmma_commit() { emu::wgmma_commit(); }
template <int N>
VD_DEV void wgmma_wait() {
  emu::wgmma_wait(N);
}
template <class T, int R>
VD_DEV void fence_regs(T (&)[R]) {}

template <class T>
constexpr emu::DT kType = emu::DT::BF16;
template <>
inline constexpr emu::DT kType<F16> = emu::DT::F16;

template <class T, int TransposeA, int TransposeB, int R>
VD_DEV void wgmma_ss(float (&d)[R], uint64_t desc_a, uint64_t desc_b, int accumulate) {
  emu::wgmma(d, 2 * R, nullptr, desc_a, desc_b, accumulate, TransposeA, TransposeB, kType<T>);
}
template <class T, int TransposeB, int R>
VD_DEV void wgmma_rs(float (&d)[R], const uint32_t* a, uint64_t desc_b, int accumulate) {
  emu::wgmma(d, 2 * R, a, 0, desc_b, accumulate, false, TransposeB, kType<T>);
}

template <int R>
VD_DEV void setmaxnreg_inc() {
  static_assert(R >= 24 && R <= 256 && R % 8 == 0, "setmaxnreg takes a multiple of 8 from 24 to 256");
  emu::setmaxnreg(R, true);
}
template <int R>
VD_DEV void setmaxnreg_dec() {
  static_assert(R >= 24 && R <= 256 && R % 8 == 0, "setmaxnreg takes a multiple of 8 from 24 to 256");
  emu::setmaxnreg(R, false);
}

// ======== host: misuse throws emu::Error with the rule that was broken

template <class... KA, class... A>
int launch(void (*kernel)(KA...), dim3 grid, dim3 block, size_t smem, stream_t, A&&... args) {
  emu::launch(kernel, grid, block, smem, std::forward<A>(args)...);
  return 0;
}
inline int make_tensor_map(TensorMap& map, const void* base, int elem_bytes, int rank, const uint64_t* dim,
                           const uint64_t* stride_bytes, const uint32_t* box, Swizzle swizzle = SW_128) {
  static constexpr uint32_t kSpan[] = {0, 128, 64, 32};
  map = emu::encode_tiled(const_cast<void*>(base), rank, dim, stride_bytes, box, elem_bytes, kSpan[swizzle]);
  return 0;
}

}  // namespace arch

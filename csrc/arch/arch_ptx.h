// PTX bodies of the primitives: one instruction each. Rules are those of the PTX ISA section of the same name.
// sm_80 and newer first, sm_90a at the end; unused wrappers cost nothing, so portable kernels include them all.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#define VD_DEV __device__ __forceinline__                   // free functions
#define VD_METHOD __device__ __forceinline__                // member functions
#define VD_STATIC_METHOD static __device__ __forceinline__  // static member functions
#define VD_KERNEL(threads, min_blocks) static __global__ void __launch_bounds__(threads, min_blocks)
#define VD_GRID_CONST __grid_constant__
#define VD_RESTRICT __restrict__
#define VD_UNROLL _Pragma("unroll")
#define VD_DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
#define VD_SHARED(T, name, n) __shared__ T name[n]

namespace arch {

using bf16 = uint16_t;
using TensorMap = CUtensorMap;
using stream_t = cudaStream_t;

// ---- numbers

VD_DEV float as_float(uint32_t bits) { return __uint_as_float(bits); }
VD_DEV uint32_t as_uint(float value) { return __float_as_uint(value); }
VD_DEV int popc(uint32_t v) { return __popc(v); }
VD_DEV int highest_bit(uint32_t v) { return 31 - __clz(int(v)); }  // -1 if there is none

VD_DEV float mul_rn(float a, float b) { return __fmul_rn(a, b); }  // never part of a fused multiply-add

VD_DEV float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VD_DEV float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VD_DEV uint32_t pack_bf16(float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
VD_DEV uint32_t pack_f16(float lo, float hi) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
  return pair;
}
VD_DEV void unpack_bf16(uint32_t pair, float& lo, float& hi) {
  lo = as_float(pair << 16);
  hi = as_float(pair & 0xffff0000u);
}
VD_DEV void unpack_f16(uint32_t pair, float& lo, float& hi) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }" : "=f"(lo), "=f"(hi) : "r"(pair));
}

#if __CUDA_ARCH__ >= 890
#define VD_HAS_CVT_E4M3
VD_DEV uint32_t cvt_e4m3(float lo, float hi) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(hi), "f"(lo));
  return pair;
}
VD_DEV uint32_t cvt_e4m3_to_f16(uint32_t pair) {
  uint32_t both;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(both) : "h"(uint16_t(pair)));
  return both;
}
#endif

// ---- shared memory

VD_DEV uint32_t smem_u32(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

VD_DEV void sts16(uint32_t a, uint32_t v) {
  asm volatile("{ .reg .b16 h; cvt.u16.u32 h, %1; st.shared.b16 [%0], h; }" ::"r"(a), "r"(v) : "memory");
}
VD_DEV void sts32(uint32_t a, uint32_t v) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(v) : "memory"); }
VD_DEV void sts64(uint32_t a, uint2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(a), "r"(v.x), "r"(v.y) : "memory");
}
VD_DEV void sts128(uint32_t a, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
VD_DEV uint32_t lds16(uint32_t a) {
  uint32_t v;
  asm volatile("{ .reg .b16 h; ld.shared.b16 h, [%1]; cvt.u32.u16 %0, h; }" : "=r"(v) : "r"(a) : "memory");
  return v;
}
VD_DEV uint32_t lds32(uint32_t a) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
VD_DEV uint2 lds64(uint32_t a) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a) : "memory");
  return v;
}
VD_DEV uint4 lds128(uint32_t a) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(a)
               : "memory");
  return v;
}

// Returns the value before the addition.
VD_DEV uint32_t shared_add(uint32_t a, uint32_t v) {
  uint32_t before;
  asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(before) : "r"(a), "r"(v) : "memory");
  return before;
}

// ---- global memory: plain accesses with the alignment rule of vectors made visible

VD_DEV uint4 ldg128(const void* p) { return *static_cast<const uint4*>(p); }
// Read once and by nobody else: past L1. Nothing may write there while the kernel runs.
VD_DEV uint4 ldg128_stream(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p)));
  return v;
}
// Read once, past L1, from memory that this thread may write to afterwards.
VD_DEV uint4 ldg128_stream_written(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}
VD_DEV uint2 ldg64_stream(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(__cvta_generic_to_global(p)));
  return v;
}
VD_DEV uint2 ldg64_stream_written(const void* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.b32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return v;
}
// Read here and now, also where another thread may write to it later on.
VD_DEV uint32_t ldg32(const void* p) {
  uint32_t v;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)) : "memory");
  return v;
}
VD_DEV void stg32(void* p, uint32_t v) { *static_cast<uint32_t*>(p) = v; }
VD_DEV void stg64(void* p, uint2 v) { *static_cast<uint2*>(p) = v; }
VD_DEV void stg128(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
VD_DEV uint32_t atomic_add(uint32_t* p, uint32_t v) { return atomicAdd(p, v); }

// ---- synchronisation inside a block and a warp

VD_DEV void syncthreads() { __syncthreads(); }
VD_DEV void syncwarp() { __syncwarp(); }
VD_DEV void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
VD_DEV void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// With a constant id the kernel claims that barrier only; with a run-time id, all 16.
template <int Id, int Threads>
VD_DEV void bar_sync() {
  asm volatile("bar.sync %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}
template <int Id, int Threads>
VD_DEV void bar_arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(Id), "n"(Threads) : "memory");
}

// ---- collectives of a whole warp

VD_DEV uint32_t shfl_xor(uint32_t v, int lane_mask) { return __shfl_xor_sync(~0u, v, lane_mask); }
VD_DEV uint32_t shfl(uint32_t v, int lane) { return __shfl_sync(~0u, v, lane); }
VD_DEV uint32_t vote_ballot(bool p) { return __ballot_sync(~0u, p); }
VD_DEV uint32_t match_any(uint32_t v) { return __match_any_sync(~0u, v); }  // lanes that hold the same value

// ---- cp.async: 16 bytes per thread, global to shared; the bytes beyond `src_bytes` become 0 and are not read

VD_DEV void cp_async16_zfill(uint32_t dst, const void* src, uint32_t src_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)),
               "r"(src_bytes)
               : "memory");
}
VD_DEV void cp_async16(uint32_t dst, const void* src, bool ok) { cp_async16_zfill(dst, src, ok ? 16 : 0); }
VD_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
VD_DEV void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- warp matrix instructions

VD_DEV void ldsm4(uint32_t a, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}
VD_DEV void ldsm4t(uint32_t a, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(a)
               : "memory");
}

#define VD_MMA(name, type)                                                            \
  VD_DEV void name(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type               \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"         \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));     \
  }
VD_MMA(mma_bf16, "bf16")
VD_MMA(mma_f16, "f16")
#undef VD_MMA

// ======== sm_90a

VD_DEV void stsm4(uint32_t a, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
VD_DEV void stsm4t(uint32_t a, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
VD_DEV bool elect_one() {
  uint32_t elected;
  asm volatile("{ .reg .pred P; elect.sync _|P, 0xffffffff; selp.b32 %0, 1, 0, P; }" : "=r"(elected));
  return elected;
}

// ---- mbarrier

VD_DEV void mbar_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
VD_DEV void fence_mbar_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
VD_DEV void mbar_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
VD_DEV void mbar_arrive_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
// Passes when the phase of this parity has completed: at once for parity 1 of a fresh barrier.
VD_DEV void mbar_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{ .reg .pred P; WAIT: mbarrier.try_wait.parity.shared::cta.b64 P, [%0], %1; @P bra DONE; bra WAIT; DONE: }" ::
          "r"(bar),
      "r"(parity)
      : "memory");
}
// One arrival when all cp.async of this thread so far have landed; it counts against the initial count.
VD_DEV void cp_async_mbar_arrive_noinc(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}
// Generic writes to shared memory before it are seen by TMA and wgmma after it.
VD_DEV void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- TMA: coordinate 0 is the innermost dimension; bytes of the whole box are counted, also outside the tensor

VD_DEV void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
VD_DEV void tma_load2(uint32_t dst, const TensorMap* map, uint32_t bar, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4}], [%2];" ::
          "r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1)
      : "memory");
}
VD_DEV void tma_load3(uint32_t dst, const TensorMap* map, uint32_t bar, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5}], "
      "[%2];" ::"r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
VD_DEV void tma_load4(uint32_t dst, const TensorMap* map, uint32_t bar, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4,%5,%6}], "
      "[%2];" ::"r"(dst),
      "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
VD_DEV void tma_store4(const TensorMap* map, uint32_t src, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2,%3,%4,%5}], [%1];" ::"l"(map),
               "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
VD_DEV void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// The shared memory of all but the last N groups may be overwritten.
template <int N>
VD_DEV void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// ---- wgmma: wgmma_ss and wgmma_rs are in wgmma_ptx.h

VD_DEV void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
VD_DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
VD_DEV void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Keeps the compiler from moving accesses to these registers across this point: after a wait, before an issue.
template <int R>
VD_DEV void fence_regs(float (&d)[R]) {
  VD_UNROLL for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int R>
VD_DEV void fence_regs(uint32_t (&d)[R]) {
  VD_UNROLL for (int i = 0; i < R; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Registers per thread of this warpgroup from here on.
template <int R>
VD_DEV void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}
template <int R>
VD_DEV void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}

// ======== host: 0 or an error code (cudaError_t)

template <class... KA, class... A>
int launch(void (*kernel)(KA...), dim3 grid, dim3 block, size_t smem, stream_t stream, A&&... args) {
  if (smem > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, KA(std::forward<A>(args))...);
}

// Tensor of 2- or 4-byte elements for TMA; stride_bytes[i] belongs to dimension i + 1. Outside the tensor it reads 0.
inline int make_tensor_map(TensorMap& map, const void* base, int elem_bytes, int rank, const uint64_t* dim,
                           const uint64_t* stride_bytes, const uint32_t* box, Swizzle swizzle = SW_128) {
  static void* found = nullptr;  // the same for every call; racing threads write the same value
  cudaDriverEntryPointQueryResult status = cudaDriverEntryPointSuccess;
  cudaError_t error = cudaSuccess;
#if CUDART_VERSION >= 12050  // the older name is gone in CUDA 13
  if (found == nullptr)
    error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
  if (found == nullptr) error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
  if (error != cudaSuccess) return error;
  if (status != cudaDriverEntryPointSuccess || found == nullptr) return cudaErrorSymbolNotFound;  // driver too old
  static constexpr CUtensorMapSwizzle kSwizzle[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                                    CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  const uint32_t every_element[5] = {1, 1, 1, 1, 1};
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  const CUresult result =
      encode(&map, elem_bytes == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
             cuuint32_t(rank), const_cast<void*>(base), reinterpret_cast<const cuuint64_t*>(dim),
             reinterpret_cast<const cuuint64_t*>(stride_bytes), box, every_element, CU_TENSOR_MAP_INTERLEAVE_NONE,
             kSwizzle[swizzle], CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace arch

#include "arch/wgmma_ptx.h"

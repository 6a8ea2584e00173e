// Emulator of one GPU block at a time on a CPU thread: what the wrappers in arch/arch_emu.h call.
//
// A CUDA thread is a fiber; a warp instruction is done by the lane that arrives last; asynchronous copies and matrix
// products leave NaN behind until they land, as late (or as early, or as randomly) as the policy says. Whatever breaks
// a rule of the hardware ends the launch with emu::Error. docs/emulator.md says what is modelled.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#ifndef __VECTOR_TYPES_H__  // only the CuTe comparison includes CUDA's headers
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
#endif

namespace emu {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// ---- how adversarial the schedule is. Plain integers: the same layout is filled from Python (tests/emulator).

enum Async : int32_t { kLazy, kEager, kRandom };             // when copies and matrix products take effect
enum WarpOrder : int32_t { kForward, kReverse, kAnyOrder };  // which warp runs next

struct Policy {
  int32_t async = kLazy;
  int32_t order = kForward;
  int32_t preempt = 0;     // switch to a woken warp at once
  int32_t poison = 1;      // destinations hold NaN until an operation lands
  int32_t check_areg = 1;  // registers of wgmma's A operand must not change before the wait
  int32_t smem_skew = 0;   // shifts the base of dynamic shared memory; a multiple of 16
  int32_t threads = 1;     // OS threads, each runs whole blocks
  int32_t reserved = 0;
  uint64_t seed = 1;
  double cpu_seconds = 120;  // per OS thread and launch; then the launch fails and names who waits
};
extern Policy policy;

struct Stats {
  uint64_t blocks, switches, collectives, mma, ldmatrix, ldmatrix_conflicts, wgmma, tma, cp_async;
  uint64_t ldg128, stg128, ldg64, stg64, ldg32, stg32;  // accesses of global memory through these wrappers
};
Stats& stats();  // since the last reset

// ---- fibers

struct ThreadIndex {
  unsigned x, y, z;
};
struct Fiber {
  enum State : uint8_t { Ready, Running, Blocked, Done };
  void* stack_pointer;
  ThreadIndex tid;
  unsigned linear, lane, warp;
  State state;
  const char* wait_kind;  // what a blocked fiber waits for, and two numbers about it
  uint32_t wait_a, wait_b;
  void* operand;  // of the warp collective it takes part in
};
extern thread_local Fiber* cur;
extern thread_local ThreadIndex block_idx, block_dim, grid_dim;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- memory

constexpr uint32_t kSmemBase = 1024;       // sm_90 reserves the first KiB of the shared window
constexpr uint32_t kSmemMax = 227 * 1024;  // PTX ISA, limits of sm_90
unsigned char* dyn_smem();
void* static_smem(const void* key, size_t bytes, size_t align);
uint32_t smem_u32(const void* p);
unsigned char* smem_at(uint32_t address, uint32_t bytes, uint32_t align, const char* who);  // checked access
const void* global_at(const void* p, uint32_t align, const char* who);
const void* ldg128(const void* p);  // the same, counted
void* stg128(void* p);
const void* ldg64(const void* p);
void* stg64(void* p);
const void* ldg32(const void* p);
void* stg32(void* p);
void generic_write(uint32_t address, uint32_t bytes);  // a write the async proxy does not see before a proxy fence
void fence_proxy_async();

// ---- warp and block

// Every lane of `mask` must come with the same kind; the last one runs fn on all operands (null for absent lanes).
void warp_collective(const char* kind, uint32_t mask, void* operand, void (*fn)(void** operands, uint32_t mask));
void bar_sync(unsigned id, unsigned count, const char* who);  // count 0: every live thread
void bar_arrive(unsigned id, unsigned count);
uint32_t shfl_xor(uint32_t mask, uint32_t value, int lane_mask);
uint32_t shfl_idx(uint32_t mask, uint32_t value, int lane);
uint32_t ballot(uint32_t mask, bool p);
uint32_t match_any(uint32_t mask, uint32_t value);
bool elect_one();
void setmaxnreg(int registers, bool increase);

// ---- sm_80

enum class DT { BF16, F16 };
void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t src_bytes);
void cp_async_commit();
void cp_async_wait(int groups);
void ldmatrix(uint32_t address, uint32_t* r, int matrices, bool transpose);
void stmatrix(uint32_t address, const uint32_t* r, int matrices, bool transpose);
void mma_16816(float* d, const uint32_t* a, const uint32_t* b, const float* c, DT type);

// ---- sm_90a

void mbar_init(uint32_t bar, uint32_t count);
void mbar_arrive(uint32_t bar, uint32_t n);
void mbar_expect_tx(uint32_t bar, uint32_t bytes);
void mbar_wait(uint32_t bar, uint32_t parity);
void fence_mbar_init();
void cp_async_mbar_arrive_noinc(uint32_t bar);

struct alignas(64) TensorMap {  // what cuTensorMapEncodeTiled is told, readable
  unsigned char* base;
  uint32_t rank, elem;
  uint64_t dim[5], stride[5];  // stride in bytes, [0] is the element
  uint32_t box[5];
  uint32_t swizzle;  // span in bytes: 0, 32, 64, 128
};
TensorMap encode_tiled(void* base, int rank, const uint64_t* dim, const uint64_t* stride_bytes, const uint32_t* box,
                       uint32_t elem, uint32_t swizzle);
void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, const int32_t* coordinate, int rank);
void tma_store(const TensorMap* map, uint32_t src, const int32_t* coordinate, int rank);
void tma_store_commit();
void tma_store_wait(int groups);

void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);
// a == nullptr: both operands in shared memory; otherwise A is 4 registers
void wgmma(float* d, int columns, const uint32_t* a, uint64_t desc_a, uint64_t desc_b, int accumulate, bool transpose_a,
           bool transpose_b, DT type);

// ---- 16-bit numbers

inline float from_bf16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
inline float from_f16(uint16_t h) {
  _Float16 f;
  memcpy(&f, &h, 2);
  return float(f);
}
inline uint16_t to_bf16(float f) {  // to nearest even; every NaN becomes 0x7fff, as cvt.rn.bf16.f32 does
  uint32_t bits;
  memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint16_t to_f16(float f) {
  if (f != f) return 0x7fff;
  const _Float16 h = static_cast<_Float16>(f);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}

// ---- launch: returns when every block has run, or throws

void launch_blocks(dim3 grid, dim3 block, size_t smem, void (*body)(void*), void* context);
template <class... KA, class... A>
void launch(void (*kernel)(KA...), dim3 grid, dim3 block, size_t smem, A&&... args) {
  std::tuple<void (*)(KA...), KA...> call(kernel, KA(std::forward<A>(args))...);
  launch_blocks(
      grid, block, smem,
      [](void* p) { std::apply([](void (*f)(KA...), KA&... x) { f(x...); }, *static_cast<decltype(call)*>(p)); },
      &call);
}

}  // namespace emu

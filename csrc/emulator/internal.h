// State of the running block, shared by the files of the emulator.
#pragma once
#include <csetjmp>
#include <string>
#include <vector>

#include "emulator/emu.h"

namespace emu {

inline float to_float(uint16_t h, DT type) { return type == DT::BF16 ? from_bf16(h) : from_f16(h); }

typedef float Float8 __attribute__((vector_size(32), may_alias));
inline Float8 load8(const float* p) {
  Float8 v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store8(float* p, Float8 v) { memcpy(p, &v, sizeof v); }

// A queue that keeps its memory: threads and blocks come by the thousand.
template <class T>
class Queue {
 public:
  bool empty() const { return head_ == items_.size(); }
  size_t size() const { return items_.size() - head_; }
  T& front() { return items_[head_]; }
  T& operator[](size_t i) { return items_[head_ + i]; }
  void push(T item) { items_.push_back(std::move(item)); }
  void pop() {
    if (++head_ == items_.size()) clear();
  }
  void erase(size_t i) { items_.erase(items_.begin() + head_ + i); }
  void clear() {
    items_.clear();
    head_ = 0;
  }

 private:
  std::vector<T> items_;
  size_t head_ = 0;
};

struct CopyOp {  // cp.async in flight
  uint32_t dst;
  const void* src;
  uint32_t bytes, src_bytes;
  bool landed;
};

struct Thread {
  Queue<CopyOp> copies;                 // in issue order, not all landed
  uint64_t copies_issued, copies_done;  // copies.size() == issued - done
  uint64_t copies_promised;             // an mbarrier will be told about the copies before this one
  Queue<uint64_t> copy_groups;          // value of copies_issued at each commit
  std::vector<uint32_t> unfenced;       // 16-byte granules of shared memory written, no proxy fence yet
  std::vector<size_t> stores;           // TMA stores since the last commit: indices into Block::stores
  Queue<std::vector<size_t>> store_groups;
  void reset();
};

struct Collective {
  uint32_t mask, arrived;
  const char* kind;
};

struct WgmmaOp {
  uint64_t number;
  int columns;
  bool from_registers, transpose_a, transpose_b, accumulate;
  DT type;
  uint64_t desc_a, desc_b;
  int accumulator;
  uint32_t a[32][4];  // A registers at issue, and where they live
  const uint32_t* a_address[32];
};

struct Accumulator {  // while products are in flight the registers hold a poison and the numbers are here
  float* registers[32];
  int columns;
  std::vector<float> rows;  // 16 x columns
  uint64_t last;            // number of the last product on it
  bool live;
};

struct Warp {
  uint32_t ready, done;
  Collective collective[4];
  Queue<WgmmaOp> wgmmas;
  std::vector<Accumulator> accumulators;
  uint64_t issued, executed;  // wgmmas
  Queue<uint64_t> groups;     // value of `issued` at each commit
  bool fenced;
  int registers, registers_wanted;  // per thread
  void reset();
};

struct NamedBarrier {
  unsigned count, arrived;
  std::vector<unsigned> per_warp;
  std::vector<Fiber*> waiters;
};

struct MbarWaiter {
  Fiber* fiber;
  uint32_t bar, parity;
};

struct TmaLoad {
  TensorMap map;
  uint32_t dst, bar, bytes;
  int32_t coordinate[5];
};

struct TmaStore {
  TensorMap map;
  uint32_t src;
  int32_t coordinate[5];
  bool done;
};

struct CopyArrival {  // cp.async.mbarrier.arrive.noinc
  unsigned thread;
  uint64_t copies;
  uint32_t bar;
};

struct IssuedWgmma {  // the four warps of a warpgroup must issue the same sequence
  uint64_t desc_b;
  int columns;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  unsigned num_threads, live;

  NamedBarrier barriers[16];
  std::vector<uint32_t> mbars;  // addresses that hold an initialised mbarrier
  bool mbar_unfenced;
  std::vector<MbarWaiter> mbar_waiters;

  Queue<TmaLoad> loads;
  std::vector<TmaStore> stores;
  Queue<CopyArrival> arrivals;
  std::vector<std::vector<IssuedWgmma>> warpgroup_log;
  std::vector<float> wgmma_b;  // scratch: 16 x 256

  unsigned char* smem;      // the shared window
  uint32_t dyn_bytes, end;  // first address after everything allocated
  std::vector<std::pair<const void*, uint32_t>> statics;
  std::vector<uint16_t> writer;  // per 16-byte granule: thread + 1 whose generic write no proxy fence followed, or
                                 // kByCopy, or 0
  std::vector<uint32_t> copied;  // granules in state kByCopy
  bool any_unfenced;

  int register_pool;  // registers per thread, summed over the warps

  unsigned current_warp;
  void* main_stack_pointer;
  std::string error;
  uint64_t random;
  void (*body)(void*);
  void* context;
  Stats stats;
};
constexpr uint16_t kByCopy = 0xffff;
extern thread_local Block* blk;

inline Thread& this_thread() { return blk->threads[cur->linear]; }
inline Warp& this_warp() { return blk->warps[cur->warp]; }

inline uint32_t random_bits() {
  uint64_t& s = blk->random;
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return uint32_t(s >> 11);
}
inline bool lands_now() { return policy.async == kEager || (policy.async == kRandom && (random_bits() & 1)); }

inline uint32_t swizzled(uint32_t address, uint32_t span) {
  switch (span) {
    case 128: return address ^ (address >> 7 & 7) << 4;
    case 64: return address ^ (address >> 7 & 3) << 4;
    case 32: return address ^ (address >> 7 & 1) << 4;
    default: return address;
  }
}

// fiber.cpp
void block_current(const char* kind, uint32_t a = 0, uint32_t b = 0);
void wake(Fiber* fiber);
void yield();
std::string describe_waiting();
void enter_block();  // runs the fibers until all are done or one failed
void switch_out();   // from a fiber that is done
void prepare_stacks(unsigned fibers);
class Watch {  // signal handlers and the CPU time limit of this OS thread, while blocks run
 public:
  Watch();
  ~Watch();
  Watch(const Watch&) = delete;

 private:
  void* state_;
};

// memory.cpp
void check_async_read(uint32_t address, uint32_t bytes, const char* who);
void copied_write(uint32_t address, uint32_t bytes);
void async_write(uint32_t address, uint32_t bytes);

// warp.cpp
void release_barriers_of_exited();

// ampere.cpp, mbarrier.cpp, tma.cpp, wgmma.cpp
void land_copies(Thread& thread, uint64_t upto);
void mbar_complete_tx(uint32_t bar, uint32_t bytes);
void mbar_arrive_async(uint32_t bar);
std::string mbar_describe(uint32_t bar);
bool deliver_one();  // lets one pending asynchronous operation land; false if there is none
void check_mbar_usable(uint32_t bar, const char* who);

// What a thread and a block may not leave behind.
void copies_at_thread_exit();
void stores_at_thread_exit();
std::string left_at_block_exit();

}  // namespace emu

// Fibers, the scheduler, and the two ways out of a failing kernel: fail() and signals.
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "emulator/guarded.h"
#include "emulator/internal.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__)
#error "the emulator's context switch is written for x86-64"
#endif

namespace emu {

thread_local Fiber* cur;
thread_local Block* blk;
thread_local ThreadIndex block_idx, block_dim, grid_dim;

// Saves the callee-saved registers of the System V ABI. pop and jmp instead of ret: the target is rarely the one the
// return predictor expects.
extern "C" void vdit_emu_switch(void** save, void* to) __attribute__((visibility("hidden")));
asm(R"(.text
.globl vdit_emu_switch
.hidden vdit_emu_switch
.type vdit_emu_switch,@function
vdit_emu_switch:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 popq %rdx; jmp *%rdx
.size vdit_emu_switch,.-vdit_emu_switch
)");

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 512 * 1024;
#else
constexpr size_t kStack = 128 * 1024;
#endif
constexpr size_t kPage = 4096;

namespace {

thread_local std::vector<char*>* stacks;  // never freed: the next launch wants them again
thread_local volatile sig_atomic_t out_of_time;

char* stack_of(size_t i) {
  if (stacks == nullptr) stacks = new std::vector<char*>;
  while (stacks->size() <= i) {
    void* p = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw Error("emulator: no memory for fiber stacks");
    mprotect(p, kPage, PROT_NONE);
    stacks->push_back(static_cast<char*>(p) + kPage);
  }
  return (*stacks)[i];
}

[[noreturn]] void leave_block() {
  void* unused;
  vdit_emu_switch(&unused, blk->main_stack_pointer);
  abort();
}

std::string where() {
  char text[160];
  if (cur == nullptr) {
    snprintf(text, sizeof text, " [block (%u,%u,%u)]", block_idx.x, block_idx.y, block_idx.z);
  } else {
    snprintf(text, sizeof text, " [block (%u,%u,%u) thread %u = warp %u lane %u]", block_idx.x, block_idx.y,
             block_idx.z, cur->linear, cur->warp, cur->lane);
  }
  return text;
}

}  // namespace

void fail(const char* format, ...) {
  char text[4096];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  if (blk == nullptr) throw Error(text);
  blk->error = text + where();
  leave_block();
}

// ---- scheduler: stays in a warp while it has ready lanes, so that collectives fill up quickly

namespace {

unsigned choose_warp() {
  const unsigned n = blk->warps.size(), current = blk->current_warp;
  const unsigned start = policy.order == kAnyOrder ? random_bits() % n : current;
  for (unsigned i = policy.order == kAnyOrder ? 0 : 1; i <= n; ++i) {
    const unsigned w = policy.order == kReverse ? (start + n - i) % n : (start + i) % n;
    if (blk->warps[w].ready) return w;
  }
  return n;
}

Fiber* next_fiber() {
  for (;;) {
    Warp* warp = &blk->warps[blk->current_warp];
    if (!warp->ready) {
      const unsigned chosen = choose_warp();
      if (chosen == blk->warps.size()) {
        if (deliver_one()) continue;
        const std::string waiting = describe_waiting();
        cur = nullptr;
        fail("deadlock:%s", waiting.c_str());
      }
      if (policy.async == kRandom && (random_bits() & 7) == 0) deliver_one();
      blk->current_warp = chosen;
      warp = &blk->warps[chosen];
    }
    const unsigned lane = __builtin_ctz(warp->ready);
    warp->ready &= warp->ready - 1;
    return &blk->fibers[blk->current_warp * 32 + lane];
  }
}

void go(Fiber* from, Fiber* to) {
  if (out_of_time) {
    const std::string waiting = describe_waiting();
    cur = nullptr;
    fail("the launch took more than %.3g CPU seconds:%s", policy.cpu_seconds, waiting.c_str());
  }
  ++blk->stats.switches;
  to->state = Fiber::Running;
  cur = to;
  if (from != to) vdit_emu_switch(&from->stack_pointer, to->stack_pointer);
}

std::string describe_wait(const Fiber& fiber) {
  const std::string kind = fiber.wait_kind;
  char text[200];
  if (fiber.state == Fiber::Ready || fiber.state == Fiber::Running) return "running";
  if (kind == "mbarrier wait") {
    snprintf(text, sizeof text, "mbarrier wait %s parity %u", mbar_describe(fiber.wait_a).c_str(), fiber.wait_b);
  } else if (kind == "bar.sync" || kind == "__syncthreads") {
    snprintf(text, sizeof text, "%s barrier %u, %u of %u threads arrived", kind.c_str(), fiber.wait_a,
             blk->barriers[fiber.wait_a].arrived, fiber.wait_b ? fiber.wait_b : blk->live);
  } else if (kind == "setmaxnreg.inc") {
    snprintf(text, sizeof text, "setmaxnreg.inc to %u registers", fiber.wait_a);
  } else {
    snprintf(text, sizeof text, "%s of lanes %08x", kind.c_str(), fiber.wait_a);
  }
  return text;
}

}  // namespace

std::string describe_waiting() {
  std::map<std::string, std::vector<unsigned>> threads_by_wait;
  for (const Fiber& fiber : blk->fibers)
    if (fiber.state != Fiber::Done) threads_by_wait[describe_wait(fiber)].push_back(fiber.linear);
  std::string text;
  for (const auto& entry : threads_by_wait) {
    const auto& threads = entry.second;
    text += " {" + std::to_string(threads.size()) + " of threads " + std::to_string(threads.front()) + ".." +
            std::to_string(threads.back()) + ": " + entry.first + "}";
  }
  return text;
}

void block_current(const char* kind, uint32_t a, uint32_t b) {
  Fiber* self = cur;
  self->state = Fiber::Blocked;
  self->wait_kind = kind;
  self->wait_a = a;
  self->wait_b = b;
  go(self, next_fiber());
}

void wake(Fiber* fiber) {
  if (fiber->state != Fiber::Blocked) return;
  fiber->state = Fiber::Ready;
  blk->warps[fiber->warp].ready |= 1u << fiber->lane;
}

void yield() {  // to another warp, if there is one
  Fiber* self = cur;
  self->state = Fiber::Ready;
  Warp& own = blk->warps[blk->current_warp];
  const uint32_t ready = own.ready;
  own.ready = 0;
  const unsigned other = choose_warp();
  own.ready = ready | 1u << self->lane;
  if (other != blk->warps.size()) blk->current_warp = other;
  go(self, next_fiber());
}

namespace {

void fiber_main() {
  blk->body(blk->context);
  copies_at_thread_exit();
  stores_at_thread_exit();
  Fiber* self = cur;
  self->state = Fiber::Done;
  blk->warps[self->warp].done |= 1u << self->lane;
  if (--blk->live == 0) leave_block();
  release_barriers_of_exited();
  go(self, next_fiber());
  abort();
}

}  // namespace

void enter_block() {
  for (Fiber& fiber : blk->fibers) {
    char* stack = stack_of(fiber.linear);
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, kStack);  // frames of a block that failed were never unwound
#endif
    // Tops at different cache sets: page-aligned ones would all meet in one.
    void** top = reinterpret_cast<void**>(stack + kStack - 64 - (fiber.linear * 832 % 8192 & ~63u));
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.stack_pointer = static_cast<void*>(top);
  }
  const unsigned warps = blk->warps.size();
  blk->current_warp = policy.order == kReverse ? warps - 1 : policy.order == kAnyOrder ? random_bits() % warps : 0;
  const unsigned first = blk->current_warp * 32;
  blk->warps[blk->current_warp].ready &= ~1u;
  blk->fibers[first].state = Fiber::Running;
  cur = &blk->fibers[first];
  vdit_emu_switch(&blk->main_stack_pointer, cur->stack_pointer);
  cur = nullptr;
}

// ---- signals: accesses of unmapped memory, and kernels that spin without ever calling the emulator

namespace {

constexpr size_t kAlternateStack = 64 * 1024;
int tick_signal() { return SIGRTMIN + 5; }

struct WatchState {
  struct sigaction old_fault, old_bus, old_tick;
  timer_t timer;
};

void on_fault(int number, siginfo_t* info, void* context) {
  if (blk == nullptr || cur == nullptr) {  // not a kernel's: let the default action end the process
    signal(number, SIG_DFL);
    return;
  }
  constexpr greg_t kWriteBit = 2;
  const bool write = static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_ERR] & kWriteBit;
  blk->error =
      std::string("global memory: ") + (write ? "write to " : "read of ") + describe_address(info->si_addr) + where();
  leave_block();
}

void on_tick(int, siginfo_t*, void*) {
  if (!out_of_time) {
    out_of_time = 1;  // noticed at the next switch of fibers
    return;
  }
  if (blk == nullptr || cur == nullptr) return;
  blk->error = "a thread loops without reaching any synchronisation" + where();
  leave_block();
}

}  // namespace

Watch::Watch() {
  static thread_local char* alternate = nullptr;
  if (alternate == nullptr) alternate = static_cast<char*>(malloc(kAlternateStack));
  stack_t stack{};
  stack.ss_sp = alternate;
  stack.ss_size = kAlternateStack;
  sigaltstack(&stack, nullptr);
  auto* state = new WatchState;
  state_ = state;
  struct sigaction action{};
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  action.sa_sigaction = on_fault;
  sigaction(SIGSEGV, &action, &state->old_fault);
  sigaction(SIGBUS, &action, &state->old_bus);
  action.sa_sigaction = on_tick;
  sigaction(tick_signal(), &action, &state->old_tick);
  out_of_time = 0;
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = tick_signal();
  event._sigev_un._tid = pid_t(syscall(SYS_gettid));
  timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &state->timer);
  const auto seconds = time_t(policy.cpu_seconds);
  itimerspec times{};
  times.it_value = {seconds, long((policy.cpu_seconds - double(seconds)) * 1e9) + 1};
  times.it_interval = {1, 0};
  timer_settime(state->timer, 0, &times, nullptr);
}

Watch::~Watch() {
  auto* state = static_cast<WatchState*>(state_);
  timer_delete(state->timer);
  sigaction(tick_signal(), &state->old_tick, nullptr);
  sigaction(SIGBUS, &state->old_bus, nullptr);
  sigaction(SIGSEGV, &state->old_fault, nullptr);
  delete state;
}

}  // namespace emu

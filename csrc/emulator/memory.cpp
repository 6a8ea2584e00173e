// The shared memory window, alignment of global accesses, and the generic and async proxies.
#include "emulator/internal.h"

namespace emu {

unsigned char* dyn_smem() { return blk->smem + kSmemBase + policy.smem_skew; }

void* static_smem(const void* key, size_t bytes, size_t align) {
  for (const auto& s : blk->statics)
    if (s.first == key) return blk->smem + s.second;
  const auto offset = uint32_t((blk->end + align - 1) / align * align);
  if (offset + bytes > kSmemBase + kSmemMax + policy.smem_skew)
    fail("dynamic and static shared memory together exceed %u bytes", kSmemMax);
  blk->end = offset + uint32_t(bytes);
  memset(blk->smem + offset, 0xff, bytes);
  blk->statics.push_back({key, offset});
  return blk->smem + offset;
}

uint32_t smem_u32(const void* p) {
  const int64_t offset = static_cast<const unsigned char*>(p) - blk->smem;
  if (offset < int64_t(kSmemBase) || offset > int64_t(blk->end)) fail("the pointer is not into shared memory");
  return uint32_t(offset);
}

unsigned char* smem_at(uint32_t address, uint32_t bytes, uint32_t align, const char* who) {
  if (address < kSmemBase || uint64_t(address) + bytes > blk->end)
    fail("%s: shared address 0x%x + %u bytes is outside [0x%x, 0x%x)", who, address, bytes, kSmemBase, blk->end);
  if (address % align) fail("%s: shared address 0x%x is not %u-byte aligned", who, address, align);
  return blk->smem + address;
}

const void* global_at(const void* p, uint32_t align, const char* who) {
  if (reinterpret_cast<uintptr_t>(p) % align) fail("%s: global address %p is not %u-byte aligned", who, p, align);
  return p;
}

const void* ldg128(const void* p) {
  ++blk->stats.ldg128;
  return global_at(p, 16, "ld.global.v4");
}

void* stg128(void* p) {
  ++blk->stats.stg128;
  return const_cast<void*>(global_at(p, 16, "st.global.v4"));
}

const void* ldg64(const void* p) {
  ++blk->stats.ldg64;
  return global_at(p, 8, "ld.global.v2");
}

void* stg64(void* p) {
  ++blk->stats.stg64;
  return const_cast<void*>(global_at(p, 8, "st.global.v2"));
}

const void* ldg32(const void* p) {
  ++blk->stats.ldg32;
  return global_at(p, 4, "ld.global");
}

void* stg32(void* p) {
  ++blk->stats.stg32;
  return const_cast<void*>(global_at(p, 4, "st.global"));
}

// PTX ISA "Async proxy": TMA and wgmma see a write made through the generic proxy only after fence.proxy.async.
// A store's fence is due in the thread that stored. What cp.async (not bulk) brought is also a generic write; its fence
// may be in any thread that knows it has landed, which is modelled as: in any thread, after it landed.

void generic_write(uint32_t address, uint32_t bytes) {
  const auto owner = uint16_t(cur->linear + 1);
  blk->any_unfenced = true;
  for (uint32_t g = address / 16; g <= (address + bytes - 1) / 16; ++g) {
    if (blk->writer[g] == owner) continue;
    blk->writer[g] = owner;
    this_thread().unfenced.push_back(g);
  }
}

void copied_write(uint32_t address, uint32_t bytes) {
  blk->any_unfenced = true;
  for (uint32_t g = address / 16; g <= (address + bytes - 1) / 16; ++g) {
    if (blk->writer[g] == kByCopy) continue;
    blk->writer[g] = kByCopy;
    blk->copied.push_back(g);
  }
}

void async_write(uint32_t address, uint32_t bytes) {
  if (!blk->any_unfenced) return;
  for (uint32_t g = address / 16; g <= (address + bytes - 1) / 16; ++g) blk->writer[g] = 0;
}

void fence_proxy_async() {
  auto& thread = this_thread();
  for (const uint32_t g : thread.unfenced)
    if (blk->writer[g] == cur->linear + 1) blk->writer[g] = 0;
  thread.unfenced.clear();
  for (const uint32_t g : blk->copied)
    if (blk->writer[g] == kByCopy) blk->writer[g] = 0;
  blk->copied.clear();
}

void check_async_read(uint32_t address, uint32_t bytes, const char* who) {
  if (!blk->any_unfenced) return;
  for (uint32_t g = address / 16; g <= (address + bytes - 1) / 16; ++g) {
    const uint16_t writer = blk->writer[g];
    if (writer == kByCopy) fail("%s reads shared 0x%x, which cp.async wrote, without fence.proxy.async", who, g * 16);
    if (writer)
      fail("%s reads shared 0x%x, which thread %u wrote, without its fence.proxy.async", who, g * 16, writer - 1);
  }
}

}  // namespace emu

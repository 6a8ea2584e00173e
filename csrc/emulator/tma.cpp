// TMA: tiled copies between global and shared memory. PTX ISA "cp.async.bulk.tensor", "Tensors"; CUDA driver API
// "cuTensorMapEncodeTiled" for the rules of the map.
#include "emulator/internal.h"

namespace emu {

TensorMap encode_tiled(void* base, int rank, const uint64_t* dim, const uint64_t* stride_bytes, const uint32_t* box,
                       uint32_t elem, uint32_t swizzle) {
  auto check = [](bool ok, const std::string& text) {
    if (!ok) throw Error("cuTensorMapEncodeTiled: " + text);
  };
  check(rank >= 1 && rank <= 5, "tensorRank " + std::to_string(rank) + " is not 1 to 5");
  check(reinterpret_cast<uintptr_t>(base) % 16 == 0, "globalAddress is not 16-byte aligned");
  TensorMap map{};
  map.base = static_cast<unsigned char*>(base);
  map.rank = uint32_t(rank);
  map.elem = elem;
  map.swizzle = swizzle;
  for (int i = 0; i < rank; ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    map.dim[i] = dim[i];
    map.box[i] = box[i];
    map.stride[i] = i ? stride_bytes[i - 1] : elem;
    check(dim[i] >= 1 && dim[i] <= 1ull << 32, "globalDim" + at + " is not 1 to 2^32");
    check(box[i] >= 1 && box[i] <= 256, "boxDim" + at + " is not 1 to 256");
    check(i == 0 || map.stride[i] % 16 == 0, "globalStrides" + at + " is not a multiple of 16");
    check(i == 0 || map.stride[i] < 1ull << 40, "globalStrides" + at + " is not below 2^40");
  }
  check(box[0] * elem % 16 == 0, "boxDim[0] * elementSize is not a multiple of 16");
  check(swizzle == 0 || box[0] * elem <= swizzle, "the inner dimension of the box exceeds the swizzle span");
  return map;
}

namespace {

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = map.elem;
  for (uint32_t i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

// Calls fn(shared address before swizzling, global address of element 0 of the row or null) for every row of the box.
template <class F>
void for_each_row(const TensorMap& map, uint32_t smem, const int32_t* coordinate, F fn) {
  uint32_t rows = 1;
  for (uint32_t i = 1; i < map.rank; ++i) rows *= map.box[i];
  for (uint32_t r = 0; r < rows; ++r) {
    uint32_t rest = r;
    unsigned char* row = map.base;
    bool inside = true;
    for (uint32_t i = 1; i < map.rank; ++i) {
      const int64_t x = coordinate[i] + int64_t(rest % map.box[i]);
      rest /= map.box[i];
      inside = inside && x >= 0 && x < int64_t(map.dim[i]);
      if (inside) row += x * int64_t(map.stride[i]);
    }
    fn(smem + r * map.box[0] * map.elem, inside ? row : nullptr);
  }
}

// Elements outside the tensor become 0; complete_tx counts them too.
void run_load(const TmaLoad& load) {
  const TensorMap& map = load.map;
  const uint32_t elem = map.elem, per_chunk = 16 / elem;
  for_each_row(map, load.dst, load.coordinate, [&](uint32_t smem, const unsigned char* row) {
    for (uint32_t x0 = 0; x0 < map.box[0]; x0 += per_chunk) {
      unsigned char* dst = blk->smem + swizzled(smem + x0 * elem, map.swizzle);
      const int64_t x = load.coordinate[0] + int64_t(x0);
      if (row && x >= 0 && x + per_chunk <= int64_t(map.dim[0])) {
        memcpy(dst, row + x * elem, 16);
        continue;
      }
      for (uint32_t i = 0; i < per_chunk; ++i) {
        const bool inside = row && x + i >= 0 && x + i < int64_t(map.dim[0]);
        if (inside)
          memcpy(dst + i * elem, row + (x + i) * elem, elem);
        else
          memset(dst + i * elem, 0, elem);
      }
    }
  });
  mbar_complete_tx(load.bar, load.bytes);
}

void run_store(TmaStore& store) {
  if (store.done) return;
  store.done = true;
  const TensorMap& map = store.map;
  for_each_row(map, store.src, store.coordinate, [&](uint32_t smem, unsigned char* row) {
    if (row == nullptr) return;
    for (uint32_t i = 0; i < map.box[0]; ++i) {
      const int64_t x = store.coordinate[0] + int64_t(i);
      if (x < 0 || x >= int64_t(map.dim[0])) continue;
      memcpy(row + x * map.elem, blk->smem + swizzled(smem + i * map.elem, map.swizzle), map.elem);
    }
  });
}

void check_copy(const TensorMap* map, uint32_t smem, int rank, const char* who) {
  if (reinterpret_cast<uintptr_t>(map) % 64) fail("%s: the tensor map is not 64-byte aligned", who);
  if (int(map->rank) != rank) fail("%s: a %dD instruction on a %uD tensor map", who, rank, map->rank);
  smem_at(smem, box_bytes(*map), 128, who);
  if (map->swizzle && smem % (8 * map->swizzle))
    fail("%s: shared 0x%x is not aligned to the %u-byte pattern of the %u-byte swizzle", who, smem, 8 * map->swizzle,
         map->swizzle);
}

}  // namespace

void tma_load(uint32_t dst, const TensorMap* map, uint32_t bar, const int32_t* coordinate, int rank) {
  check_copy(map, dst, rank, "TMA load");
  check_mbar_usable(bar, "TMA load");
  TmaLoad load{*map, dst, bar, box_bytes(*map), {}};
  memcpy(load.coordinate, coordinate, sizeof(int32_t) * rank);
  ++blk->stats.tma;
  async_write(dst, load.bytes);
  if (policy.async == kEager) {
    run_load(load);
    return;
  }
  if (policy.poison) memset(blk->smem + dst, 0xff, load.bytes);
  blk->loads.push(load);
}

void tma_store(const TensorMap* map, uint32_t src, const int32_t* coordinate, int rank) {
  check_copy(map, src, rank, "TMA store");
  check_async_read(src, box_bytes(*map), "TMA store");
  TmaStore store{*map, src, {}, false};
  memcpy(store.coordinate, coordinate, sizeof(int32_t) * rank);
  ++blk->stats.tma;
  if (lands_now()) run_store(store);
  this_thread().stores.push_back(blk->stores.size());
  blk->stores.push_back(store);
}

void tma_store_commit() {
  Thread& thread = this_thread();
  thread.store_groups.push(thread.stores);
  thread.stores.clear();
}

void tma_store_wait(int groups) {
  Thread& thread = this_thread();
  while (int(thread.store_groups.size()) > groups) {
    for (const size_t i : thread.store_groups.front()) run_store(blk->stores[i]);
    thread.store_groups.pop();
  }
}

void stores_at_thread_exit() {
  Thread& thread = this_thread();
  if (!thread.stores.empty() || !thread.store_groups.empty())
    fail("thread exits with TMA stores it did not wait for: shared memory may be gone before they have read it");
}

// What the copy engines do on their own: when every fiber waits, or at random moments.
bool deliver_one() {
  const size_t pending = blk->loads.size() + blk->arrivals.size();
  if (pending == 0) return false;
  size_t i = policy.async == kRandom ? random_bits() % pending : 0;
  Fiber* const self = cur;
  if (i < blk->loads.size()) {
    const TmaLoad load = blk->loads[i];
    if (i == 0)
      blk->loads.pop();
    else
      blk->loads.erase(i);
    run_load(load);
  } else {
    i -= blk->loads.size();
    const CopyArrival arrival = blk->arrivals[i];
    if (i == 0)
      blk->arrivals.pop();
    else
      blk->arrivals.erase(i);
    land_copies(blk->threads[arrival.thread], arrival.copies);
    mbar_arrive_async(arrival.bar);
  }
  cur = self;
  return true;
}

}  // namespace emu

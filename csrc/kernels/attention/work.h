// Device side of Work: from the number of a CTA to the rows and keys it handles. Shared by all attention kernels.
#pragma once
#include "arch/arch.h"
#include "kernels/attention/forward.h"

namespace vdit::gpu {

// Rows [first, first + rows) of a tile that begins at q_start, for one batch item and head. rows == 0: nothing to do.
struct Item {
  int32_t batch, head;
  int32_t tile;   // -1: dense
  int32_t start;  // permuted position of the item's first row
  int32_t first;  // its number in the tile (mask bits are stored by it)
  int32_t rows;
};

struct TileRows {
  int32_t bh, start, rows;
};

// A tile with its numbers clamped to what exists.
VD_DEV TileRows load_tile(const Plan& plan, int32_t lq, int32_t tile) {
  TileRows t;
  t.bh = plan.tiles[3 * int64_t(tile)];
  t.start = plan.tiles[3 * int64_t(tile) + 1];
  t.rows = plan.tiles[3 * int64_t(tile) + 2];
  if (t.bh < 0 || t.bh >= plan.batch * plan.heads || t.start < 0 || t.start >= lq || t.rows < 0) t.rows = 0;
  if (t.rows > lq - t.start) t.rows = lq - t.start;
  return t;
}

VD_DEV Item locate(const AttentionParams& p, const Work& w, int64_t index) {
  Item item{};
  if (w.header != nullptr && w.only_uncovered && w.header[1] != 0) return item;
  if (w.items == nullptr) {
    const int32_t blocks = (p.lq + w.rows - 1) / w.rows;
    const int64_t bh = index / blocks;
    item.batch = int32_t(bh / p.heads);
    item.head = int32_t(bh % p.heads);
    item.tile = -1;
    item.start = item.first = int32_t(index % blocks) * w.rows;
    item.rows = p.lq - item.start < w.rows ? p.lq - item.start : w.rows;
    return item;
  }
  const int32_t slot = int32_t(index % w.capacity), replica = int32_t(index / w.capacity);
  if (slot >= w.header[0]) return item;
  item.tile = w.items[2 * int64_t(slot)];
  item.first = w.items[2 * int64_t(slot) + 1];
  const TileRows t = load_tile(p.plan, p.lq, item.tile);
  const int32_t head_replicas = p.plan.heads == 1 ? p.heads : 1;
  item.batch = p.plan.batch == 1 ? replica / head_replicas : t.bh / p.plan.heads;
  item.head = p.plan.heads == 1 ? replica % head_replicas : t.bh % p.plan.heads;
  item.start = t.start + item.first;
  item.rows = t.rows - item.first < w.rows ? t.rows - item.first : w.rows;
  return item;
}

// Keys with an original index at or above this do not exist.
VD_DEV int32_t key_limit(const AttentionParams& p, int32_t batch) {
  if (p.kv_len == nullptr) return p.lk;
  const int64_t n =
      p.kv_len_bytes == 8 ? static_cast<const int64_t*>(p.kv_len)[batch] : static_cast<const int32_t*>(p.kv_len)[batch];
  return n < 0 ? 0 : n < p.lk ? int32_t(n) : p.lk;
}

VD_DEV const int32_t* order_row(const Order& o, int32_t batch, int32_t head, int32_t n) {
  if (o.data == nullptr) return nullptr;
  return o.data + (int64_t(o.batch == 1 ? 0 : batch) * o.heads + (o.heads == 1 ? 0 : head)) * n;
}

VD_DEV const char* row_pointer(const Rows& r, int32_t batch, int32_t head, int64_t row, int32_t element_bytes) {
  return static_cast<const char*>(r.data) +
         (batch * r.batch_stride + head * r.head_stride + row * r.row_stride) * element_bytes;
}

}  // namespace vdit::gpu

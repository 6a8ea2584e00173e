// Guarded copies of what attention kernels are given.
#pragma once
#include "emulator/harness.h"
#include "kernels/attention/params.h"

namespace vdit::gpu {

using emu::Harness;

inline size_t element_bytes(DType type) { return type == DType::f32 ? 4 : 2; }

inline Rows guarded_rows(Harness& h, const char* name, const Rows& rows, int64_t batch, int64_t count, int64_t heads,
                         int64_t dim, size_t elem) {
  Rows copy = rows;
  copy.data = h.input_strided(name, rows.data, elem, {batch, count, heads, dim},
                              {rows.batch_stride, rows.row_stride, rows.head_stride, 1});
  return copy;
}

inline Order guarded_order(Harness& h, const char* name, const Order& order, int64_t n) {
  Order copy = order;
  copy.data = h.input(name, order.data, size_t(order.batch) * order.heads * n);
  return copy;
}

inline AttentionParams guarded_params(Harness& h, const AttentionParams& from) {
  AttentionParams p = from;
  const size_t elem = element_bytes(p.dtype);
  p.q = guarded_rows(h, "q", from.q, p.batch, p.lq, p.heads, p.dim, elem);
  p.k = guarded_rows(h, "k", from.k, p.batch, p.lk, p.kv_heads, p.dim, elem);
  p.v = guarded_rows(h, "v", from.v, p.batch, p.lk, p.kv_heads, p.dim, elem);
  const Plan& plan = from.plan;
  p.plan.tiles = h.input("plan.tiles", plan.tiles, size_t(plan.num_tiles) * 3);
  p.plan.run_ptr = h.input("plan.run_ptr", plan.run_ptr, size_t(plan.num_tiles) + 1);
  p.plan.runs = h.input("plan.runs", plan.runs, size_t(plan.num_runs) * 3);
  p.plan.mask_bits = h.input("plan.mask_bits", plan.mask_bits, size_t(plan.num_mask_words));
  p.plan.q_order = guarded_order(h, "plan.q_order", plan.q_order, p.lq);
  p.plan.kv_order = guarded_order(h, "plan.kv_order", plan.kv_order, p.lk);
  p.row_scale = h.input("row_scale", from.row_scale, size_t(p.batch) * p.heads * p.lq);
  p.kv_len = h.input_bytes("kv_len", from.kv_len, size_t(p.batch) * p.kv_len_bytes, 8);
  for (int i = 0; i < p.num_segments; ++i) {
    const Segment& s = from.segment[i];
    p.segment[i].k = guarded_rows(h, "segment k", s.k, p.batch, s.length, p.kv_heads, p.dim, elem);
    p.segment[i].v = guarded_rows(h, "segment v", s.v, p.batch, s.length, p.kv_heads, p.dim, elem);
  }
  return p;
}

}  // namespace vdit::gpu

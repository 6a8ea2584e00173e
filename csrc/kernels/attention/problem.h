// Host-side facts of a problem that every entry needs: sizes, and which calls the operator must have refused.
#pragma once
#include "kernels/attention/params.h"

namespace vdit::gpu {

constexpr int kInvalid = 1;  // cudaErrorInvalidValue

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t key_count(const AttentionParams& p) {
  int64_t n = p.lk;
  for (int i = 0; i < p.num_segments; ++i) n += p.segment[i].length;
  return n;
}

inline bool rows_aligned(const Rows& r, int64_t batch, int64_t n, int64_t heads) {
  return reinterpret_cast<uintptr_t>(r.data) % 16 == 0 && (batch <= 1 || r.batch_stride % 8 == 0) &&
         (n <= 1 || r.row_stride % 8 == 0) && (heads <= 1 || r.head_stride % 8 == 0);
}

inline bool valid_problem(const AttentionParams& p) {
  if (p.dim < 8 || p.dim > 256 || p.dim % 8 != 0 || p.dtype == DType::f32) return false;
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0 || p.num_segments < 0 || p.num_segments > kMaxSegments) return false;
  if (p.plan.tiles != nullptr && (p.batch % p.plan.batch != 0 || p.heads % p.plan.heads != 0)) return false;
  if (key_count(p) > INT32_MAX - 4096 || p.lq > INT32_MAX - 4096) return false;
  bool aligned = rows_aligned(p.q, p.batch, p.lq, p.heads) && rows_aligned(p.k, p.batch, p.lk, p.kv_heads) &&
                 rows_aligned(p.v, p.batch, p.lk, p.kv_heads);
  for (int i = 0; i < p.num_segments; ++i) {
    const Segment& s = p.segment[i];
    aligned = aligned && rows_aligned(s.k, p.batch, s.length, p.kv_heads);
    aligned = aligned && rows_aligned(s.v, p.batch, s.length, p.kv_heads);
  }
  return aligned;
}

}  // namespace vdit::gpu

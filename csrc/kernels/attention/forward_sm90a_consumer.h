// A consumer warpgroup: S = Q K^T, online softmax, O += P V for 64 query rows, and the results.
#pragma once
#include "kernels/attention/forward_sm90a_stage.h"

namespace vdit::gpu::sm90a {

constexpr float kLn2 = 0.693147180559945309f;

// Two rows per thread: lane / 4 and lane / 4 + 8 of its warp's 16. Columns of element 4 * j + 2 * row + e of S and O:
// 8 * j + 2 * (lane % 4) + e.
struct Softmax {
  float top[2];     // running maximum of the scores, before scale_log2
  float sum[2];     // of this thread's columns
  float shrink[2];  // what O has to be multiplied with after the last step
};

// S = Q K^T, one commit group.
template <class T, int kDim>
VD_DEV void issue_scores(float (&s)[64], uint32_t q, uint32_t k) {
  using S = Smem<kDim>;
  arch::wgmma_fence();
  VD_UNROLL for (int i = 0; i < kDim / 16; ++i) {
    const uint32_t at = (i / 4) * S::kPanelBytes + (i % 4) * 32;
    arch::wgmma_ss<T, 0, 0>(s, arch::wgmma_desc(q + at, 16, 1024, arch::SW_128),
                            arch::wgmma_desc(k + at, 16, 1024, arch::SW_128), i > 0);
  }
  arch::wgmma_commit();
}

// O += P V, one commit group.
template <class T, int kDim>
VD_DEV void issue_values(float (&o)[kDim / 2], const uint32_t (&p)[32], uint32_t v) {
  arch::wgmma_fence();
  VD_UNROLL for (int i = 0; i < kKeys / 16; ++i) {
    arch::wgmma_rs<T, 1>(o, p + 4 * i, arch::wgmma_desc(v + i * 2048, Smem<kDim>::kPanelBytes, 1024, arch::SW_128), 1);
  }
  arch::wgmma_commit();
}

// Scores of slots that are not read become -inf. `row`: the thread's first row in the item.
VD_DEV void mask_scores(float (&s)[64], uint4 valid, uint32_t flags, uint32_t blocked, int row, int lane) {
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    uint32_t read[4] = {valid.x, valid.y, valid.z, valid.w};
    if (flags & kBlocks) {
      const uint4 b = arch::lds128(blocked + (row + 8 * r) * 16);
      read[0] &= ~b.x;
      read[1] &= ~b.y;
      read[2] &= ~b.z;
      read[3] &= ~b.w;
    }
    VD_UNROLL for (int w = 0; w < 4; ++w) {
      const uint32_t bits = read[w] >> (2 * (lane % 4));
      VD_UNROLL for (int j = 0; j < 4; ++j) {
        VD_UNROLL for (int e = 0; e < 2; ++e) {
          if (!(bits >> (8 * j + e) & 1)) s[16 * w + 4 * j + 2 * r + e] = -INFINITY;
        }
      }
    }
  }
}

// Scores to weights, relative to the new maximum.
VD_DEV void softmax_step(float (&s)[64], Softmax& f, float scale_log2) {
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    float top = f.top[r];
    VD_UNROLL for (int j = 0; j < 16; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    top = fmaxf(top, arch::shfl_xor_f(top, 1));
    top = fmaxf(top, arch::shfl_xor_f(top, 2));
    const float base = top == -INFINITY ? 0.f : top * scale_log2;  // nothing read so far: weights 0, not NaN
    f.shrink[r] = arch::ex2(f.top[r] * scale_log2 - base);
    f.top[r] = top;
    float sum = f.sum[r] * f.shrink[r];
    VD_UNROLL for (int j = 0; j < 16; ++j) {
      VD_UNROLL for (int e = 0; e < 2; ++e) {
        const float weight = arch::ex2(s[4 * j + 2 * r + e] * scale_log2 - base);
        s[4 * j + 2 * r + e] = weight;
        sum += weight;
      }
    }
    f.sum[r] = sum;
  }
}

template <int R>
VD_DEV void rescale(float (&o)[R], const Softmax& f) {
  VD_UNROLL for (int i = 0; i < R; ++i) o[i] *= f.shrink[(i >> 1) & 1];
}

// The accumulator layout of S is the A operand of P V.
template <class T>
VD_DEV void to_weights(const float (&s)[64], uint32_t (&p)[32]) {
  VD_UNROLL for (int i = 0; i < 32; ++i) p[i] = arch::pack<T>(s[2 * i], s[2 * i + 1]);
}

// The order in which the two warpgroups issue their products, so that one computes its softmax while the other feeds
// the tensor cores: named barriers 1 and 2, each completed by one warpgroup entering and the other leaving.
VD_DEV void enter_turn(int group) {
  if (group == 0) {
    arch::bar_sync<1, 256>();
  } else {
    arch::bar_sync<2, 256>();
  }
}
VD_DEV void leave_turn(int group) {
  if (group == 0) {
    arch::bar_arrive<2, 256>();
  } else {
    arch::bar_arrive<1, 256>();
  }
}

// One barrier for each warpgroup by itself.
VD_DEV void sync_group(int group) {
  if (group == 0) {
    arch::bar_sync<3, 128>();
  } else {
    arch::bar_sync<4, 128>();
  }
}

struct StageView {
  uint4 valid;
  uint32_t flags;
  VD_METHOD bool masked() const { return (valid.x & valid.y & valid.z & valid.w) != ~0u || (flags & kBlocks); }
};

// Waits for K stage j; its record belongs to the stage.
template <int kDim>
VD_DEV StageView wait_keys(uint32_t smem, const Barriers& bars, int j) {
  const int stage = j % kStages;
  arch::mbar_wait(bars.k_full(stage), (j / kStages) & 1);
  const uint32_t record = smem + Smem<kDim>::kRecord + stage * Smem<kDim>::kRecordBytes;
  const StageView view{arch::lds128(record), arch::lds128(record + 16).x};
  if (view.flags & kGeneric) arch::fence_proxy_async();
  return view;
}

// `flags` of the stage, `next` of the one whose keys were waited for before: the copies of a thread land in order, so
// that a fence after those keys served these values as well.
VD_DEV void wait_values(const Barriers& bars, int j, uint32_t flags, uint32_t next) {
  arch::mbar_wait(bars.v_full(j % kStages), (j / kStages) & 1);
  if (flags & ~next & kGeneric) arch::fence_proxy_async();
}

// Everything between the arrival of a score tile and its softmax. Frees the K stage.
template <int kDim>
VD_DEV void finish_scores(const KernelParams& kp, float (&s)[64], const StageView& view, uint32_t smem,
                          const Barriers& bars, int j, int row, int lane) {
  const int stage = j % kStages;
  if (kp.pre_scale != 1.f) {
    VD_UNROLL for (int i = 0; i < 64; ++i) s[i] *= kp.pre_scale;
  }
  if (view.masked()) {
    mask_scores(s, view.valid, view.flags, smem + Smem<kDim>::kBlocked + stage * Smem<kDim>::kBlockedBytes, row, lane);
  }
  arch::syncwarp();
  if (lane == 0) arch::mbar_arrive(bars.k_empty(stage));
}

// The stages of one warpgroup. `group` 0 or 1; alternating warpgroups take every other stage and no turns.
template <class T, int kDim>
VD_DEV void consume(const KernelParams& kp, bool alternate, uint32_t smem, const Barriers& bars, int group,
                    float (&o)[kDim / 2], Softmax& f) {
  using S = Smem<kDim>;
  const int lane = threadIdx.x % 32, step = alternate ? 2 : 1;
  const int row = (alternate ? 0 : 64 * group) + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const uint32_t q = smem + S::kQ + (alternate ? 0 : 64 * 128 * group), k = smem + S::kK, v = smem + S::kV;
  float s[64];
  uint32_t p[32];
  if (!alternate && group == 0) arch::bar_arrive<1, 256>();  // the first turn
  arch::mbar_wait(bars.q_full, 0);
  arch::fence_proxy_async();
  int j = alternate ? group : 0;
  StageView view = wait_keys<kDim>(smem, bars, j);
  if (!(view.flags & kEnd)) {
    if (!alternate) enter_turn(group);
    issue_scores<T, kDim>(s, q, k + j % kStages * S::kTileBytes);
    if (!alternate) leave_turn(group);
    arch::wgmma_wait<0>();
    arch::fence_regs(s);
    finish_scores<kDim>(kp, s, view, smem, bars, j, row, lane);
    softmax_step(s, f, kp.scale_log2);
    to_weights<T>(s, p);
    for (;;) {
      const int last = j;
      const uint32_t last_flags = view.flags;
      j += step;
      view = wait_keys<kDim>(smem, bars, j);
      if (view.flags & kEnd) {
        wait_values(bars, last, last_flags, view.flags);
        issue_values<T, kDim>(o, p, v + last % kStages * S::kTileBytes);
        arch::wgmma_wait<0>();
        arch::fence_regs(o);
        break;
      }
      if (!alternate) enter_turn(group);
      issue_scores<T, kDim>(s, q, k + j % kStages * S::kTileBytes);
      wait_values(bars, last, last_flags, view.flags);
      issue_values<T, kDim>(o, p, v + last % kStages * S::kTileBytes);
      if (!alternate) leave_turn(group);
      arch::wgmma_wait<1>();
      arch::fence_regs(s);
      finish_scores<kDim>(kp, s, view, smem, bars, j, row, lane);
      softmax_step(s, f, kp.scale_log2);
      arch::wgmma_wait<0>();
      arch::fence_regs(o);
      if (lane == 0) arch::mbar_arrive(bars.v_empty(last % kStages));
      rescale(o, f);
      to_weights<T>(s, p);
    }
  }
  if (!alternate && group == 0) arch::bar_sync<1, 256>();  // the turn nobody takes
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    f.sum[r] += arch::shfl_xor_f(f.sum[r], 1);
    f.sum[r] += arch::shfl_xor_f(f.sum[r], 2);
  }
}

// Alternating warpgroups: the second hands its half to the first through its own K stage and that stage's blocked bits,
// which nobody reads or writes any more. Thread i continues thread i.
template <int kDim>
VD_DEV void merge_groups(uint32_t smem, int group, float (&o)[kDim / 2], Softmax& f, float scale_log2) {
  using S = Smem<kDim>;
  const int thread = threadIdx.x % 128;
  const uint32_t tile = smem + S::kK + S::kTileBytes + thread * 16;
  const uint32_t tops = smem + S::kBlocked + S::kBlockedBytes + thread * 16;
  if (group == 1) {
    VD_UNROLL for (int i = 0; i < kDim / 8; ++i) {
      arch::sts128(tile + i * 2048, uint4{arch::as_uint(o[4 * i]), arch::as_uint(o[4 * i + 1]),
                                          arch::as_uint(o[4 * i + 2]), arch::as_uint(o[4 * i + 3])});
    }
    arch::sts128(tops, uint4{arch::as_uint(f.top[0]), arch::as_uint(f.top[1]), arch::as_uint(f.sum[0]),
                             arch::as_uint(f.sum[1])});
  }
  arch::bar_sync<5, 256>();
  if (group == 1) return;
  const uint4 t = arch::lds128(tops);
  const float top1[2] = {arch::as_float(t.x), arch::as_float(t.y)};
  const float sum1[2] = {arch::as_float(t.z), arch::as_float(t.w)};
  float shrink1[2];
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const float top = fmaxf(f.top[r], top1[r]), base = top == -INFINITY ? 0.f : top * scale_log2;
    f.shrink[r] = arch::ex2(f.top[r] * scale_log2 - base);
    shrink1[r] = arch::ex2(top1[r] * scale_log2 - base);
    f.sum[r] = f.sum[r] * f.shrink[r] + sum1[r] * shrink1[r];
    f.top[r] = top;
  }
  VD_UNROLL for (int i = 0; i < kDim / 8; ++i) {
    const uint4 b = arch::lds128(tile + i * 2048);
    const float other[4] = {arch::as_float(b.x), arch::as_float(b.y), arch::as_float(b.z), arch::as_float(b.w)};
    VD_UNROLL for (int e = 0; e < 4; ++e) {
      const int r = e >> 1;
      o[4 * i + e] = o[4 * i + e] * f.shrink[r] + other[e] * shrink1[r];
    }
  }
}

// fp32 results of one split: rows stay in the order of the item.
template <int kDim>
VD_DEV void store_part(const AttentionParams& p, const Work& work, const Item& item, int64_t part, int first,
                       const float (&o)[kDim / 2], const Softmax& f, float scale_log2) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = first + lane / 4 + 8 * r;
    if (row >= item.rows) continue;
    const int64_t at = part * work.rows + row;
    const bool empty = f.sum[r] == 0.f;
    if (lane % 4 == 0) work.part_lse[at] = empty ? -INFINITY : f.top[r] * scale_log2 + arch::lg2(f.sum[r]);
    const float scale = 1.f / f.sum[r];
    float* out = work.part_out + at * p.dim;
    VD_UNROLL for (int j = 0; j < kDim / 8; ++j) {
      const int column = 8 * j + 2 * (lane % 4);
      if (column < p.dim && !empty) {
        out[column] = o[4 * j + 2 * r] * scale;
        out[column + 1] = o[4 * j + 2 * r + 1] * scale;
      }
    }
  }
}

// Results in the original order of the queries: registers -> this warp's rows of the Q tile -> rows of 16-byte stores.
template <class T, int kDim>
VD_DEV void store_rows(const ForwardArgs& a, const Item& item, uint32_t q, int first, int group,
                       const float (&o)[kDim / 2], const Softmax& f, float scale_log2) {
  const AttentionParams& p = a.params;
  constexpr int kChunks = kDim / 8, kRowsAtOnce = 32 / kChunks;
  const int lane = threadIdx.x % 32;
  const int32_t* order = order_row(p.plan.q_order, item.batch, item.head, p.lq);
  const int64_t stat = (int64_t(item.batch) * p.heads + item.head) * p.lq;
  // Lanes 0 .. 15 find where row `lane` of the warp goes.
  int target = -1;
  if (lane < 16 && first + lane < item.rows) {
    target = item.start + first + lane;
    if (order != nullptr) target = order[target];
    if (target < 0 || target >= p.lq) target = -1;
  }
  float scale[2];
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const int to = int(arch::shfl(target, lane / 4 + 8 * r));
    const bool empty = f.sum[r] == 0.f;
    scale[r] = empty ? 0.f : 1.f / f.sum[r];
    if (to < 0) continue;
    if (lane % 4 == 0) {
      a.outputs.lse[stat + to] = empty ? -INFINITY : (f.top[r] * scale_log2 + arch::lg2(f.sum[r])) * kLn2;
    }
    if (p.row_scale != nullptr) scale[r] *= p.row_scale[stat + to];
  }
  sync_group(group);  // no warp of the group multiplies with the Q tile any more
  const uint32_t tile = q + first % 64 * 128;
  VD_UNROLL for (int j = 0; j < kDim / 16; ++j) {
    uint32_t x[4];
    VD_UNROLL for (int i = 0; i < 4; ++i) {
      const int r = i % 2, e = 8 * j + 4 * (i / 2) + 2 * r;
      const bool empty = f.sum[r] == 0.f;
      x[i] = empty ? 0 : arch::pack<T>(o[e] * scale[r], o[e + 1] * scale[r]);
    }
    const int row = lane % 16, chunk = 2 * j + lane / 16;
    arch::stsm4(tile + (chunk / 8) * Smem<kDim>::kPanelBytes + row * 128 + ((chunk ^ row) % 8) * 16, x);
  }
  arch::syncwarp();
  VD_UNROLL for (int i = 0; i < 16 / kRowsAtOnce; ++i) {
    const int row = i * kRowsAtOnce + lane / kChunks, chunk = lane % kChunks;
    const int to = int(arch::shfl(target, row));
    const uint4 x = arch::lds128(tile + (chunk / 8) * Smem<kDim>::kPanelBytes + row * 128 + ((chunk ^ row) % 8) * 16);
    if (to >= 0 && chunk * 8 < p.dim) {
      uint16_t* out = static_cast<uint16_t*>(a.outputs.out);
      const int64_t at = ((int64_t(item.batch) * p.lq + to) * p.heads + item.head) * p.dim + chunk * 8;
      arch::stg128(out + at, x);
    }
  }
}

}  // namespace vdit::gpu::sm90a

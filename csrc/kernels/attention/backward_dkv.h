// dk and dv of 64 keys per CTA: mma.sync, cp.async, 4 warps of 16 keys. K and V of the block stay in shared memory,
// dk and dv in registers; query rows with their gradients pass by in stages of kQueries rows of one tile.
//
//   stage j + 1: find its rows, issue Q, dO, records | S^T = K Q^T | dP^T = V dO^T | dv += P^T dO | dk += dS^T Q
//
// Two buffers for stages; one barrier per stage: stage j has landed and all warps are done with stage j - 1. Rows are
// keys here, so what a slot without a key holds stays in a row that is not stored.
#pragma once
#include "kernels/attention/backward_queries.h"

namespace vdit::gpu::backward {

template <int kDim>
struct DkvConfig {
  static constexpr int kQueries = kDim <= 64 ? 64 : 32;
  static constexpr uint32_t kKeyTile = kBlockKeys * kDim * 2, kQueryTile = kQueries * kDim * 2;
  static constexpr uint32_t kRecordBytes = kQueries * 16, kBitBytes = kQueries * 8;
  static constexpr uint32_t kV = kKeyTile, kQ = 2 * kKeyTile;     // Q0 dO0 Q1 dO1
  static constexpr uint32_t kRecords = kQ + 4 * kQueryTile;       // [2][kQueries]
  static constexpr uint32_t kBits = kRecords + 2 * kRecordBytes;  // [2][keys 0-31, 32-63][kQueries]: readable keys
  static constexpr uint32_t kMatches = kBits + 2 * kBitBytes;
  static constexpr uint32_t kKeyIds = kMatches + QueryStream<kQueries>::kBytes;
  static constexpr uint32_t kBytes = kKeyIds + kBlockKeys * 4;
  static constexpr int kMinBlocks = kDim > 64 ? 2 : 3;
};

template <int kDim>
VD_DEV void load_queries(const BackwardArgs& a, const KeyBlock& keys, const QueryBlock& q, uint32_t smem, int buffer) {
  using C = DkvConfig<kDim>;
  const AttentionParams& p = a.params;
  const int32_t* q_order = keys.segment < 0 ? order_row(p.plan.q_order, q.batch, q.head, p.lq) : nullptr;
  auto original = [&](int row) {
    if (row >= q.rows) return -1;
    const int32_t n = q_order != nullptr ? q_order[q.start + row] : q.start + row;
    return n < p.lq ? n : -1;
  };
  auto address = [&](const Rows& rows, int row) -> const char* {
    const int32_t n = original(row);
    return n >= 0 ? row_pointer(rows, q.batch, q.head, n, 2) : nullptr;
  };
  const uint32_t tile = smem + C::kQ + buffer * 2 * C::kQueryTile;
  load_rows<kDim, C::kQueries>(p, tile, [&](int row) { return address(p.q, row); });
  load_rows<kDim, C::kQueries>(p, tile + C::kQueryTile, [&](int row) { return address(a.dout, row); });
  if (threadIdx.x < C::kQueries) {
    const int32_t n = original(threadIdx.x);
    const RowRecord* from = a.records + ((int64_t(q.batch) * p.heads + q.head) * p.lq + (n >= 0 ? n : 0));
    arch::cp_async16(smem + C::kRecords + buffer * C::kRecordBytes + threadIdx.x * 16, from, n >= 0);
  }
  if (!q.full && threadIdx.x < 2 * C::kQueries) {
    const int row = threadIdx.x % C::kQueries, word = threadIdx.x / C::kQueries;
    const uint32_t bits = row < q.rows ? readable_keys(p, q, q.first + row, keys.first + 32 * word) : 0u;
    arch::sts32(smem + C::kBits + buffer * C::kBitBytes + threadIdx.x * 4, bits);
  }
}

// Keys that a query does not read: score -inf, and a product with dout that cannot matter.
template <int kQueries>
VD_DEV void mask_keys(Fragments<kQueries / 8>& s, Fragments<kQueries / 8>& dp, uint32_t bits) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int key = 16 * (warp % 2) + lane / 4;
  VD_UNROLL for (int n = 0; n < kQueries / 8; ++n) {
    const uint2 pair = arch::lds64(bits + (warp / 2 * kQueries + 8 * n + 2 * (lane % 4)) * 4);
    VD_UNROLL for (int c = 0; c < 4; ++c) {
      if (((c % 2 == 0 ? pair.x : pair.y) >> (key + c / 2 * 8) & 1u) == 0) {
        s[n][c] = -INFINITY;
        dp[n][c] = 0.f;
      }
    }
  }
}

// Scores and products with dout to P^T * row_scale and dS^T / scale.
template <int kQueries>
VD_DEV void score_gradients(Fragments<kQueries / 8>& s, Fragments<kQueries / 8>& dp, uint32_t records,
                            float scale_log2) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int n = 0; n < kQueries / 8; ++n) {
    VD_UNROLL for (int c = 0; c < 2; ++c) {
      const uint4 record = arch::lds128(records + (8 * n + 2 * (lane % 4) + c) * 16);
      const float lse2 = arch::as_float(record.x), delta = arch::as_float(record.y);
      const float row_scale = arch::as_float(record.z);
      VD_UNROLL for (int r = c; r < 4; r += 2) {
        const float weight = arch::ex2(fmaf(s[n][r], scale_log2, -lse2));
        dp[n][r] = weight * fmaf(row_scale, dp[n][r], -delta);
        s[n][r] = weight * row_scale;
      }
    }
  }
}

template <int kDim>
VD_DEV void store_part(const Fragments<kDim / 8>& f, float factor, float* part, const RowStore& to) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = threadIdx.x / 32 * 16 + lane / 4 + 8 * r;
    const int32_t original = int32_t(arch::lds32(to.row_ids + row * 4));
    if (original < 0) continue;
    float* at = part + int64_t(original) * to.dim + 2 * (lane % 4);
    VD_UNROLL for (int n = 0; n < kDim / 8; ++n) {
      if (8 * n >= to.dim) continue;
      at[8 * n] = original < to.limit ? f[n][2 * r] * factor : 0.f;
      at[8 * n + 1] = original < to.limit ? f[n][2 * r + 1] * factor : 0.f;
    }
  }
}

template <class T, int kDim>
VD_KERNEL(kThreads, DkvConfig<kDim>::kMinBlocks)
key_gradients(const VD_GRID_CONST BackwardArgs a) {
  using C = DkvConfig<kDim>;
  constexpr int kQueries = C::kQueries;
  const AttentionParams& p = a.params;
  KeyBlock keys = locate_keys(a, blockIdx.x);
  const bool main = keys.segment < 0;
  const Rows& k_rows = main ? p.k : p.segment[keys.segment].k;
  const Rows& v_rows = main ? p.v : p.segment[keys.segment].v;
  int32_t limit = main ? key_limit(p, keys.batch) : keys.length;
  if (main && p.plan.kv_order.data == nullptr && keys.first >= limit) keys.batches = 0;  // none of these keys exists
  if (keys.batches == 0) limit = 0;

  VD_DYN_SMEM(raw);
  const uint32_t smem = arch::smem_u32(raw), key_ids = smem + C::kKeyIds;
  const int warp_row = threadIdx.x / 32 * 16;
  if (threadIdx.x < kBlockKeys) {
    const int32_t position = keys.first + threadIdx.x;
    const int32_t* kv_order = main ? order_row(p.plan.kv_order, keys.batch, keys.head, p.lk) : nullptr;
    int32_t original = position < keys.length ? position : -1;
    if (original >= 0 && kv_order != nullptr) original = kv_order[position];
    if (original >= keys.length) original = -1;
    arch::sts32(key_ids + threadIdx.x * 4, uint32_t(original));
  }
  arch::syncthreads();
  auto key_address = [&](const Rows& rows, int row) -> const char* {
    const int32_t n = int32_t(arch::lds32(key_ids + row * 4));
    return n >= 0 && n < limit ? row_pointer(rows, keys.batch, keys.kv_head, n, 2) : nullptr;
  };
  load_rows<kDim, kBlockKeys>(p, smem, [&](int row) { return key_address(k_rows, row); });
  load_rows<kDim, kBlockKeys>(p, smem + C::kV, [&](int row) { return key_address(v_rows, row); });

  float dk[kDim / 8][4], dv[kDim / 8][4];
  clear<kDim / 8>(dk);
  clear<kDim / 8>(dv);
  QueryStream<kQueries> stream(a, keys, smem + C::kMatches);
  QueryBlock block{};
  bool more = stream.next(a, keys, block);
  if (more) load_queries<kDim>(a, keys, block, smem, 0);
  arch::cp_async_commit();

  for (int buffer = 0; more; buffer ^= 1) {
    const bool full = block.full;
    const uint32_t queries = smem + C::kQ + buffer * 2 * C::kQueryTile, douts = queries + C::kQueryTile;
    arch::cp_async_wait<0>();
    arch::syncthreads();
    more = stream.next(a, keys, block);
    if (more) load_queries<kDim>(a, keys, block, smem, buffer ^ 1);
    arch::cp_async_commit();

    float s[kQueries / 8][4], dp[kQueries / 8][4];
    clear<kQueries / 8>(s);
    clear<kQueries / 8>(dp);
    multiply_rows<T, kDim, kQueries>(s, queries,
                                     [&](int k, uint32_t (&f)[4]) { load_left<kDim>(smem, warp_row, k, f, a.sign); });
    multiply_rows<T, kDim, kQueries>(dp, douts,
                                     [&](int k, uint32_t (&f)[4]) { load_left<kDim>(smem + C::kV, warp_row, k, f); });
    if (!full) mask_keys<kQueries>(s, dp, smem + C::kBits + buffer * C::kBitBytes);
    score_gradients<kQueries>(s, dp, smem + C::kRecords + buffer * C::kRecordBytes, a.scale_log2);
    uint32_t weights[kQueries / 16][4], gradients[kQueries / 16][4];
    VD_UNROLL for (int i = 0; i < kQueries / 16; ++i) {
      pack_left<T>(s[2 * i], s[2 * i + 1], weights[i]);
      pack_left<T>(dp[2 * i], dp[2 * i + 1], gradients[i]);
    }
    multiply_columns<T, kDim, kQueries>(dv, weights, douts);
    multiply_columns<T, kDim, kQueries>(dk, gradients, queries);
  }
  arch::cp_async_wait<0>();
  arch::syncthreads();  // K and V have landed also where no query reads them

  RowStore to{key_ids, limit, nullptr, int64_t(p.kv_heads) * p.dim * 2, p.dim};
  if (main && a.part_dk != nullptr) {
    const int64_t at = (int64_t(keys.batch) * p.heads + keys.head) * p.lk * p.dim;
    store_part<kDim>(dk, p.scale, a.part_dk + at, to);
    store_part<kDim>(dv, 1.f, a.part_dv + at, to);
    return;
  }
  const int64_t at = (int64_t(keys.batch) * keys.length * p.kv_heads + keys.kv_head) * p.dim * 2;
  to.base = static_cast<char*>(main ? a.grads.dk : a.grads.segment_dk[keys.segment]) + at;
  store_rows<T, kDim>(dk, p.scale, smem, to);
  to.base = static_cast<char*>(main ? a.grads.dv : a.grads.segment_dv[keys.segment]) + at;
  store_rows<T, kDim>(dv, 1.f, smem + C::kV, to);
}

template <class T, int kDim>
int launch_dkv(const BackwardArgs& args, void* stream) {
  return arch::launch(key_gradients<T, kDim>, dim3(unsigned(dkv_blocks(args))), dim3(kThreads), DkvConfig<kDim>::kBytes,
                      static_cast<arch::stream_t>(stream), args);
}

}  // namespace vdit::gpu::backward

// dq of 64 query rows per CTA: mma.sync, cp.async, 4 warps of 16 rows. Items, stages of 64 keys and their masks are
// those of the forward (forward_sm80.h, forward_sm80_keys.h).
//
//   barrier A | issue K(j+1) | resolve j+2 | S = Q K(j), P | dP = dO V(j), dS | publish j+2 | barrier B | issue V(j+1)
//   | dq += dS K(j)
//
// Two buffers for K, one for V. Barrier A: K(j) and V(j) have landed, all warps are done with K(j-1). Barrier B: all
// are done with V(j), and the addresses of stage j+2 are published. Slots without a key are zero-filled and have
// weight 0.
#pragma once
#include "kernels/attention/backward_tile.h"

namespace vdit::gpu::backward {

constexpr int kKeys = 64;

template <int kDim>
struct DqConfig {
  static constexpr uint32_t kTile = kKeys * kDim * 2;                       // also of 64 query rows
  static constexpr uint32_t kV = 2 * kTile, kDout = 3 * kTile, kQ = kTile;  // K0 K1 V dO; Q until K1 is loaded
  static constexpr uint32_t kInfo = 4 * kTile;
  static constexpr uint32_t kRowIds = kInfo + sm80::StageInfo<kKeys>::kBytes;
  static constexpr uint32_t kSums = kRowIds + kKeys * 4;
  static constexpr uint32_t kBytes = kSums + 16;
  static constexpr int kMinBlocks = kDim > 64 ? 2 : 3;
};

template <class T, int kDim>
VD_KERNEL(kThreads, DqConfig<kDim>::kMinBlocks)
query_gradients(const VD_GRID_CONST BackwardArgs a) {
  using C = DqConfig<kDim>;
  constexpr int kSteps = kDim / 16;
  const AttentionParams& p = a.params;
  const Item item = locate(p, a.work, blockIdx.x);
  if (item.rows <= 0) return;

  VD_DYN_SMEM(raw);
  const uint32_t smem = arch::smem_u32(raw), row_ids = smem + C::kRowIds;
  const sm80::StageInfo<kKeys> info{smem + C::kInfo};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp * 16;
  if (threadIdx.x < sm80::kRows) {
    const int32_t* q_order = order_row(p.plan.q_order, item.batch, item.head, p.lq);
    int32_t original = -1;
    if (int(threadIdx.x) < item.rows) original = item.start + threadIdx.x;
    if (original >= 0 && q_order != nullptr) original = q_order[original];
    if (original >= p.lq) original = -1;
    arch::sts32(row_ids + threadIdx.x * 4, uint32_t(original));
  }
  const sm80::KeyList list = sm80::list_keys<kThreads>(p, item, smem + C::kSums);
  const int stages = (list.total + kKeys - 1) / kKeys;
  auto k_tile = [&](int j) { return smem + (j & 1) * C::kTile; };

  float dq[kDim / 8][4];
  clear<kDim / 8>(dq);
  if (stages > 0) {
    const int32_t* kv_order = order_row(p.plan.kv_order, item.batch, item.head, p.lk);
    auto address = [&](const Rows& rows, int row) -> const char* {
      const int32_t n = int32_t(arch::lds32(row_ids + row * 4));
      return n >= 0 ? row_pointer(rows, item.batch, item.head, n, 2) : nullptr;
    };
    load_rows<kDim, sm80::kRows>(p, smem + C::kQ, [&](int row) { return address(p.q, row); });
    load_rows<kDim, sm80::kRows>(p, smem + C::kDout, [&](int row) { return address(a.dout, row); });
    sm80::RunWindow window{};
    int32_t original[kKeys / 32];
    int pieces = 0;
    auto resolve = [&](int j) {
      pieces = sm80::resolve<kKeys>(p, list, window, j, info.pieces(j), original);
      VD_UNROLL for (int i = 0; i < kKeys / 32; ++i) original[i] = sm80::original_key(p, kv_order, original[i]);
    };
    if (warp == 0) {
      if (item.tile < 0) {
        window.load_dense(list);
      } else {
        window.next = list.run;
        window.load(p, list);
      }
      for (int j = 0; j < 2; ++j) {
        resolve(j);
        sm80::publish<kKeys>(p, item, list, j, pieces, original, info);
      }
    }
    float lse2[2], delta[2], row_scale[2];
    VD_UNROLL for (int r = 0; r < 2; ++r) {
      const int32_t row = int32_t(arch::lds32(row_ids + (warp_row + lane / 4 + 8 * r) * 4));
      const RowRecord* from = a.records + (int64_t(item.batch) * p.heads + item.head) * p.lq + row;
      const RowRecord record = row >= 0 ? *from : RowRecord{INFINITY, 0.f, 0.f, 0.f};
      lse2[r] = record.lse2;
      delta[r] = record.delta;
      row_scale[r] = record.row_scale;
    }
    arch::syncthreads();
    sm80::load_keys<kDim, kKeys>(p, k_tile(0), info.k_pointers(0));
    sm80::load_keys<kDim, kKeys>(p, smem + C::kV, info.v_pointers(0));
    arch::cp_async_commit();
    arch::cp_async_wait<0>();
    arch::syncthreads();
    uint32_t q[kSteps][4];
    VD_UNROLL for (int k = 0; k < kSteps; ++k) load_left<kDim>(smem + C::kQ, warp_row, k, q[k], a.sign);

    // Mask bits of stages j and j + 1: lane l keeps those of row l % 16 and slots from 32 (l / 16) on.
    const int64_t mask_row = item.first + warp_row + lane % 16;
    auto bits_of = [&](int j) {
      const int count = int(arch::lds128(info.header(j)).z);
      const bool inside = warp_row + lane % 16 < item.rows;
      return inside ? sm80::slot_bits(p.plan, info.pieces(j), count, mask_row, lane / 16) : 0u;
    };
    uint32_t bits = bits_of(0), next_bits = bits_of(1);

    for (int j = 0; j < stages; ++j) {
      arch::cp_async_wait<0>();
      arch::syncthreads();
      if (j + 1 < stages) sm80::load_keys<kDim, kKeys>(p, k_tile(j + 1), info.k_pointers(j + 1));
      arch::cp_async_commit();
      if (warp == 0 && j + 2 < stages) resolve(j + 2);

      const uint4 header = arch::lds128(info.header(j));
      uint32_t ds[kKeys / 16][4];
      VD_UNROLL for (int half = 0; half < 2; ++half) {  // 32 keys at a time: fewer registers
        const uint32_t rows = half * 32 * kDim * 2, valid = half == 0 ? header.x : header.y;
        float s[4][4], dp[4][4];
        clear<4>(s);
        clear<4>(dp);
        multiply_rows<T, kDim, 32>(s, k_tile(j) + rows, [&](int k, uint32_t (&f)[4]) {
          VD_UNROLL for (int i = 0; i < 4; ++i) f[i] = q[k][i];
        });
        if (valid != ~0u || header.z != 0)
          sm80::mask_scores<32>(s, uint4{valid, 0, header.z, 0}, half == 0 ? bits : arch::shfl_xor(bits, 16));
        multiply_rows<T, kDim, 32>(dp, smem + C::kV + rows,
                                   [&](int k, uint32_t (&f)[4]) { load_left<kDim>(smem + C::kDout, warp_row, k, f); });
        VD_UNROLL for (int n = 0; n < 4; ++n) {
          VD_UNROLL for (int c = 0; c < 4; ++c) {
            const float weight = arch::ex2(fmaf(s[n][c], a.scale_log2, -lse2[c / 2]));
            s[n][c] = weight * fmaf(row_scale[c / 2], dp[n][c], -delta[c / 2]);
          }
        }
        pack_left<T>(s[0], s[1], ds[2 * half]);
        pack_left<T>(s[2], s[3], ds[2 * half + 1]);
      }
      if (warp == 0 && j + 2 < stages) sm80::publish<kKeys>(p, item, list, j + 2, pieces, original, info);

      arch::syncthreads();
      if (j + 1 < stages) sm80::load_keys<kDim, kKeys>(p, smem + C::kV, info.v_pointers(j + 1));
      arch::cp_async_commit();
      bits = next_bits;
      if (j + 2 < stages) next_bits = bits_of(j + 2);
      multiply_columns<T, kDim, kKeys>(dq, ds, k_tile(j));
    }
    arch::cp_async_wait<0>();
    arch::syncthreads();  // the tiles are free
  }
  const int64_t at = (int64_t(item.batch) * p.lq * p.heads + item.head) * p.dim * 2;
  const RowStore to{row_ids, INT32_MAX, static_cast<char*>(a.grads.dq) + at, int64_t(p.heads) * p.dim * 2, p.dim};
  store_rows<T, kDim>(dq, p.scale, smem, to);
}

template <class T, int kDim>
int launch_dq(const BackwardArgs& args, void* stream) {
  return arch::launch(query_gradients<T, kDim>, dim3(unsigned(args.work.capacity * args.work.replicas)), dim3(kThreads),
                      DqConfig<kDim>::kBytes, static_cast<arch::stream_t>(stream), args);
}

}  // namespace vdit::gpu::backward

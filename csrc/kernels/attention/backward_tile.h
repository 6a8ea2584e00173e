// Products of tiles in shared memory and the way of gradients to their rows: what both backward kernels do. 4 warps,
// each with 16 rows of a result; layouts and copies are those of forward_sm80.h.
#pragma once
#include "kernels/attention/backward.h"
#include "kernels/attention/forward_sm80.h"

namespace vdit::gpu::backward {

using sm80::chunk_offset;
using sm80::Copy;
using sm80::Fragments;
using sm80::kThreads;

template <int kTiles>
VD_DEV void clear(Fragments<kTiles>& f) {
  VD_UNROLL for (int n = 0; n < kTiles; ++n) VD_UNROLL for (int c = 0; c < 4; ++c) f[n][c] = 0.f;
}

// 16-byte pieces of the rows that row(r) gives: an address, or null for zeros.
template <int kDim, int kRows, class Row>
VD_DEV void load_rows(const AttentionParams& p, uint32_t tile, Row row) {
  constexpr int kChunks = kDim / 8;
  VD_UNROLL for (int n = 0; n < kRows * kChunks / kThreads; ++n) {
    const Copy<kChunks> c(n);
    const char* from = c.chunk * 8 < p.dim ? row(c.row) : nullptr;
    arch::cp_async16(tile + c.offset, from != nullptr ? from + c.chunk * 16 : p.q.data, from != nullptr);
  }
}

// 16 rows of a tile as the left operand of step k of a product over the head dim, with their signs flipped or not.
template <int kDim>
VD_DEV void load_left(uint32_t tile, int row, int k, uint32_t (&a)[4], uint32_t sign = 0) {
  const int lane = threadIdx.x % 32;
  arch::ldsm4(tile + chunk_offset<kDim / 8>(row + lane % 16, 2 * k + lane / 16), a);
  VD_UNROLL for (int i = 0; i < 4; ++i) a[i] ^= sign;
}

// c += a b^T over the head dim: b is a tile of kRows rows. left(k, a) brings step k of a.
template <class T, int kDim, int kRows, class Left>
VD_DEV void multiply_rows(Fragments<kRows / 8>& c, uint32_t b_tile, Left left) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[4];
    left(k, a);
    VD_UNROLL for (int n = 0; n < kRows / 16; ++n) {
      uint32_t b[4];
      const int row = n * 16 + lane % 8 + lane / 16 * 8;
      arch::ldsm4(b_tile + chunk_offset<kDim / 8>(row, 2 * k + lane / 8 % 2), b);
      arch::mma<T>(c[2 * n], a, b[0], b[1]);
      arch::mma<T>(c[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// Two neighbouring accumulators as the left operand of a step of 16 columns.
template <class T>
VD_DEV void pack_left(const float (&low)[4], const float (&high)[4], uint32_t (&a)[4]) {
  a[0] = arch::pack<T>(low[0], low[1]);
  a[1] = arch::pack<T>(low[2], low[3]);
  a[2] = arch::pack<T>(high[0], high[1]);
  a[3] = arch::pack<T>(high[2], high[3]);
}

// c += a b: a has kRows columns in registers, b is a tile of kRows rows.
template <class T, int kDim, int kRows>
VD_DEV void multiply_columns(Fragments<kDim / 8>& c, const uint32_t (&a)[kRows / 16][4], uint32_t b_tile) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int k = 0; k < kRows / 16; ++k) {
    VD_UNROLL for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      arch::ldsm4t(b_tile + chunk_offset<kDim / 8>(k * 16 + lane % 16, 2 * n + lane / 16), b);
      arch::mma<T>(c[2 * n], a[k], b[0], b[1]);
      arch::mma<T>(c[2 * n + 1], a[k], b[2], b[3]);
    }
  }
}

// A row of the tile goes to row `original` of a tensor; -1: nowhere; from `limit` on: zeros.
struct RowStore {
  uint32_t row_ids;  // in shared memory, one per row
  int32_t limit;
  char* base;
  int64_t row_bytes;
  int32_t dim;
};

// Through shared memory to 16-byte stores. A warp uses its own 16 rows of the tile.
template <class T, int kDim>
VD_DEV void store_rows(const Fragments<kDim / 8>& f, float factor, uint32_t tile, const RowStore& to) {
  constexpr int kChunks = kDim / 8;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, column = 2 * (lane % 4);
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const int row = warp_row + lane / 4 + 8 * r;
    const bool zero = int32_t(arch::lds32(to.row_ids + row * 4)) >= to.limit;
    VD_UNROLL for (int n = 0; n < kChunks; ++n) {
      const uint32_t pair = zero ? 0u : arch::pack<T>(f[n][2 * r] * factor, f[n][2 * r + 1] * factor);
      arch::sts32(tile + chunk_offset<kChunks>(row, n) + column * 2, pair);
    }
  }
  arch::syncwarp();
  VD_UNROLL for (int n = 0; n < 16 * kChunks / 32; ++n) {
    const int i = lane + 32 * n, row = warp_row + i / kChunks, chunk = i % kChunks;
    const int32_t original = int32_t(arch::lds32(to.row_ids + row * 4));
    if (original < 0 || chunk * 8 >= to.dim) continue;
    arch::stg128(to.base + original * to.row_bytes + chunk * 16,
                 arch::lds128(tile + chunk_offset<kChunks>(row, chunk)));
  }
}

}  // namespace vdit::gpu::backward

// Nearest centroids, compute capability 8.0 and newer: mma.sync, cp.async; 4 warps, each with 32 tokens (16 for head
// dims above 128) whose rows stay in registers while stages of 64 centroids pass by.
//
//   wait, barrier | issue stage j+S-1 | 32 centroids: accumulators = -|c|^2/2, += x.c, running (maximum, index) | 32
//   more
//
// S stages. The barrier says that stage j has landed and that all warps are done with stage j-1, whose buffer is filled
// next. Maximising x.c - |c|^2/2 is minimising |c|^2 - 2 x.c; halving is exact.
#pragma once
#include "arch/arch.h"
#include "kernels/select/kmeans.h"

namespace vdit::gpu::kmeans {

constexpr int kThreads = 128;
constexpr int kCentres = 64;  // of a stage; the packed centroids are padded to a multiple

struct Args {
  KmeansParams params;
  const uint16_t* centres;  // [B * H][padded][kDim], x's dtype, zero beyond D and C
  const float* norms;       // [B * H][padded]: -|c|^2/2, -inf beyond C
  int32_t padded;
  int32_t aligned;  // rows of x are made of 16-byte pieces
  int32_t tiles;    // of tokens, per head
};

template <int kDim>
struct Config {
  static constexpr int kTiles = kDim > 128 ? 1 : 2;  // of 16 tokens, per warp
  static constexpr int kTokens = 4 * 16 * kTiles;    // of a CTA
  static constexpr int kStages = kDim > 128 ? 2 : 3;
  static constexpr int kChunks = kDim / 8;  // 16-byte pieces of a row
  static constexpr uint32_t kStage = kCentres * kDim * 2;
  static constexpr uint32_t kX = kStage;  // tokens lie where stages 1 ... are loaded later
  static constexpr uint32_t kNorms = kStages * kStage;
  static constexpr uint32_t kBytes = kNorms + kStages * kCentres * 4;
  static constexpr int kMinBlocks = kDim > 128 ? 2 : 3;
  static_assert(kTokens * kDim * 2 == (kStages - 1) * kStage, "the tokens fill the later stages exactly");
};

// Swizzled, so that the 8 rows that one ldmatrix phase reads lie in different banks.
template <int kChunks>
VD_DEV uint32_t chunk_offset(int row, int chunk) {
  return (row * kChunks + (chunk ^ (row & 7))) * 16;
}

template <int kDim>
VD_DEV void load_stage(const Args& a, int64_t head, uint32_t smem, int stage) {
  using C = Config<kDim>;
  const uint32_t tile = smem + stage % C::kStages * C::kStage,
                 norms = smem + C::kNorms + stage % C::kStages * kCentres * 4;
  const int64_t first = head * a.padded + int64_t(stage) * kCentres;
  VD_UNROLL for (int n = 0; n < kCentres * C::kChunks / kThreads; ++n) {
    const int i = threadIdx.x + n * kThreads, row = i / C::kChunks, chunk = i % C::kChunks;
    arch::cp_async16(tile + chunk_offset<C::kChunks>(row, chunk), a.centres + (first + row) * kDim + chunk * 8, true);
  }
  if (threadIdx.x < kCentres / 4) arch::cp_async16(norms + threadIdx.x * 16, a.norms + first + threadIdx.x * 4, true);
}

// Rows of x, zero beyond N and D.
template <int kDim>
VD_DEV void load_tokens(const Args& a, int64_t batch, int64_t head, int64_t first, uint32_t tile) {
  using C = Config<kDim>;
  const KmeansParams& p = a.params;
  const auto* x = static_cast<const uint16_t*>(p.x.data) + batch * p.x.batch_stride + head * p.x.head_stride;
  VD_UNROLL for (int n = 0; n < C::kTokens * C::kChunks / kThreads; ++n) {
    const int i = threadIdx.x + n * kThreads, row = i / C::kChunks, d = i % C::kChunks * 8;
    const uint32_t to = tile + chunk_offset<C::kChunks>(row, d / 8);
    const uint16_t* from = x + (first + row) * p.x.row_stride + d;
    const bool inside = first + row < p.tokens && d < p.dim;
    if (a.aligned != 0) {
      arch::cp_async16(to, inside ? static_cast<const void*>(from) : p.x.data, inside);
    } else {
      uint32_t pair[4];
      VD_UNROLL for (int e = 0; e < 4; ++e) {
        const uint32_t low = inside && d + 2 * e < p.dim ? from[2 * e] : 0u;
        const uint32_t high = inside && d + 2 * e + 1 < p.dim ? from[2 * e + 1] : 0u;
        pair[e] = low | high << 16;
      }
      arch::sts128(to, uint4{pair[0], pair[1], pair[2], pair[3]});
    }
  }
}

template <class T, int kDim>
VD_KERNEL(kThreads, Config<kDim>::kMinBlocks)
assign(const VD_GRID_CONST Args a) {
  using C = Config<kDim>;
  constexpr int kSteps = kDim / 16, kTiles = C::kTiles;
  VD_DYN_SMEM(raw);
  const KmeansParams& p = a.params;
  const uint32_t smem = arch::smem_u32(raw);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t sequence = blockIdx.x / a.tiles, first = int64_t(blockIdx.x % a.tiles) * C::kTokens;
  const int stages = a.padded / kCentres;

  load_tokens<kDim>(a, sequence / p.heads, sequence % p.heads, first, smem + C::kX);
  load_stage<kDim>(a, sequence, smem, 0);
  arch::cp_async_commit();
  arch::cp_async_wait<0>();
  arch::syncthreads();
  uint32_t x[kTiles][kSteps][4];
  VD_UNROLL for (int m = 0; m < kTiles; ++m) {
    VD_UNROLL for (int k = 0; k < kSteps; ++k) arch::ldsm4(
        smem + C::kX + chunk_offset<C::kChunks>((warp * kTiles + m) * 16 + lane % 16, 2 * k + lane / 16), x[m][k]);
  }
  arch::syncthreads();  // the tokens are in registers
  VD_UNROLL for (int s = 1; s < C::kStages - 1; ++s) {
    if (s < stages) load_stage<kDim>(a, sequence, smem, s);
    arch::cp_async_commit();
  }

  float best[kTiles][2];  // of rows lane / 4 and lane / 4 + 8
  int32_t label[kTiles][2];
  VD_UNROLL for (int m = 0; m < kTiles; ++m) {
    best[m][0] = best[m][1] = -INFINITY;
    label[m][0] = label[m][1] = 0;
  }
  for (int j = 0; j < stages; ++j) {
    arch::cp_async_wait<C::kStages - 2>();
    arch::syncthreads();
    if (j + C::kStages - 1 < stages) load_stage<kDim>(a, sequence, smem, j + C::kStages - 1);
    arch::cp_async_commit();
    const uint32_t tile = smem + j % C::kStages * C::kStage;
    const uint32_t norms = smem + C::kNorms + j % C::kStages * kCentres * 4 + 2 * (lane % 4) * 4;
    VD_UNROLL for (int half = 0; half < 2; ++half) {
      float s[kTiles][4][4];
      VD_UNROLL for (int n = 0; n < 4; ++n) {
        const uint2 pair = arch::lds64(norms + (half * 32 + n * 8) * 4);
        VD_UNROLL for (int m = 0; m < kTiles; ++m) {
          s[m][n][0] = s[m][n][2] = arch::as_float(pair.x);
          s[m][n][1] = s[m][n][3] = arch::as_float(pair.y);
        }
      }
      VD_UNROLL for (int k = 0; k < kSteps; ++k) {
        VD_UNROLL for (int n = 0; n < 2; ++n) {
          uint32_t c[4];
          const int row = half * 32 + n * 16 + lane % 8 + lane / 16 * 8;
          arch::ldsm4(tile + chunk_offset<C::kChunks>(row, 2 * k + lane / 8 % 2), c);
          VD_UNROLL for (int m = 0; m < kTiles; ++m) {
            arch::mma<T>(s[m][2 * n], x[m][k], c[0], c[1]);
            arch::mma<T>(s[m][2 * n + 1], x[m][k], c[2], c[3]);
          }
        }
      }
      // In the order of the indices, and only something larger wins: the lowest of equal ones stays.
      VD_UNROLL for (int m = 0; m < kTiles; ++m) {
        VD_UNROLL for (int n = 0; n < 4; ++n) {
          VD_UNROLL for (int e = 0; e < 4; ++e) {
            if (s[m][n][e] > best[m][e / 2]) {
              best[m][e / 2] = s[m][n][e];
              label[m][e / 2] = j * kCentres + half * 32 + n * 8 + e % 2;
            }
          }
        }
      }
    }
  }
  arch::cp_async_wait<0>();

  VD_UNROLL for (int m = 0; m < kTiles; ++m) {
    VD_UNROLL for (int r = 0; r < 2; ++r) {
      float top = best[m][r];
      int32_t at = label[m][r] + 2 * (lane % 4);
      VD_UNROLL for (int step = 1; step < 4; step *= 2) {
        const float other = arch::shfl_xor_f(top, step);
        const auto other_at = int32_t(arch::shfl_xor(uint32_t(at), step));
        if (other > top || (other == top && other_at < at)) {
          top = other;
          at = other_at;
        }
      }
      const int64_t token = first + (warp * kTiles + m) * 16 + lane / 4 + 8 * r;
      if (lane % 4 == 0 && token < p.tokens) p.labels[sequence * p.tokens + token] = at;
    }
  }
}

}  // namespace vdit::gpu::kmeans

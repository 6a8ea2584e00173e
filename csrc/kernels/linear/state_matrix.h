// The state on tensor cores: phi(k)^T [v, 1], compute capability 8.0 and newer (mma.sync, cp.async).
//
// A CTA owns a part of one head's tokens and the whole state of it, in registers: a warp has a quarter of the features
// and 64 columns of values. Stages of 64 tokens. Hedgehog, with one buffer each for keys, values and features:
//
//   barrier A | issue v(j) | y = k(j) W | softmax of y and -y | exchange of row halves (128 columns), features stored
//   barrier B | issue k(j+1) | state += phi^T v(j)
//
// A: k(j) has landed, all warps are done with v(j-1) and its features. B: v(j) has landed, the features are stored, all
// are done with k(j). The other maps need no features in memory: two buffers, one barrier, and the map is applied to
// the fragments of k. The column of ones that makes the denominator is a fragment made on the spot; it is zero where no
// token is, as the rows of k and v are.
#pragma once
#include "kernels/linear/tile.h"

namespace vdit::gpu::linear {

struct StateArgs {
  LinearStateParams p;
  int32_t splits, stages;
  float* to;  // [splits][batch, heads, features, dim_v + 1]
};

constexpr int kStageTokens = 64;

template <int kDim, bool kHedgehog>
struct StateConfig {
  static constexpr int kWarps = kDim / 16, kThreads = 32 * kWarps, kChunks = kDim / 8;
  static constexpr int kGroups = kDim / 64;                      // of 64 value columns
  static constexpr int kFeatures = kHedgehog ? 2 * kDim : kDim;  // padded
  static constexpr int kTiles = kFeatures / 64;                  // of 16 features, per warp
  static constexpr int kSumTiles = kTiles / kGroups;             // whose sums a warp makes
  static constexpr uint32_t kTile = kStageTokens * kDim * 2;
  // Hedgehog: W, k, v, features, halves of rows. Others: two buffers of k, v and, if there is one, k_den.
  static constexpr uint32_t kK = kHedgehog ? kDim * kDim * 2 : 0, kV = kK + kTile, kPhi = kV + kTile;
  static constexpr uint32_t kHalves = kPhi + 2 * kTile;
  static constexpr uint32_t kHedgehogBytes = kHalves + (kGroups > 1 ? 2 * kStageTokens * 16 : 0);
  static constexpr int kMinBlocks = kHedgehog ? (kDim > 64 ? 1 : 2) : (kDim > 64 ? 2 : 4);
};

// 64 rows from token `first` on, zeros from `end` and from column dim on.
template <int kDim, bool kHedgehog>
VD_DEV void load_stage(const TokenRows& x, int32_t batch, int32_t head, int32_t first, int32_t end, int32_t dim,
                       uint32_t tile) {
  using C = StateConfig<kDim, kHedgehog>;
  constexpr int kStep = C::kThreads / C::kChunks;  // rows
  static_assert(kStep % 8 == 0, "the swizzle does not change from step to step");
  const int row = threadIdx.x / C::kChunks, chunk = threadIdx.x % C::kChunks;
  const uint32_t to = tile + chunk_offset<C::kChunks>(row, chunk);
  const auto* from = static_cast<const uint16_t*>(x.data) + row_offset(x, batch, head, first + row) + chunk * 8;
  VD_UNROLL for (int n = 0; n < kStageTokens / kStep; ++n) {
    const bool inside = first + row + n * kStep < end && chunk * 8 < dim;
    arch::cp_async16(to + n * kStep * C::kChunks * 16,
                     inside ? static_cast<const void*>(from + n * kStep * x.row_stride) : x.data, inside);
  }
}

// W of a head as rows of kDim columns, zeros beyond dim.
template <class T, int kDim>
VD_DEV void load_weight(const LinearWeight& w, int32_t head, int32_t dim, uint32_t tile, int threads) {
  constexpr int kChunks = kDim / 8;
  for (int i = threadIdx.x; i < kDim * kChunks; i += threads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    uint32_t pair[4] = {0, 0, 0, 0};
    if (row < dim && column < dim) {
      VD_UNROLL for (int e = 0; e < 4; ++e) pair[e] =
          arch::pack<T>(weight_at(w, head, row, column + 2 * e), weight_at(w, head, row, column + 2 * e + 1));
    }
    arch::sts128(tile + chunk_offset<kChunks>(row, column / 8), uint4{pair[0], pair[1], pair[2], pair[3]});
  }
}

// Features of a stage: k W, softmax of both signs, to shared memory. A warp has 16 tokens and 64 columns.
template <class T, int kDim>
VD_DEV void store_features(uint32_t smem, int32_t dim) {
  using C = StateConfig<kDim, true>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp % 4 * 16, half = warp / 4;
  float y[8][4] = {};
  VD_UNROLL for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[4];
    arch::ldsm4(smem + C::kK + chunk_offset<C::kChunks>(row + lane % 16, 2 * k + lane / 16), a);
    VD_UNROLL for (int n = 0; n < 4; ++n) {
      uint32_t b[4];
      load_right<C::kChunks>(smem, k * 16, half * 4 + n, b);
      arch::mma<T>(y[2 * n], a, b[0], b[1]);
      arch::mma<T>(y[2 * n + 1], a, b[2], b[3]);
    }
  }
  const SignedScores<8> s(y, half * 64, dim);
  float m[8][4], plus[2] = {0.f, 0.f}, minus[2] = {0.f, 0.f};
  VD_UNROLL for (int n = 0; n < 8; ++n) {
    VD_UNROLL for (int c = 0; c < 4; ++c) {
      m[n][c] = s.minus(n, c);
      y[n][c] = s.plus(n, c);
      plus[c / 2] += y[n][c];
      minus[c / 2] += m[n][c];
    }
  }
  float scale_p[2], scale_m[2];
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    plus[r] = quad_sum(plus[r]);
    minus[r] = quad_sum(minus[r]);
    scale_p[r] = 1.f / plus[r];
    scale_m[r] = 1.f / minus[r];
  }
  if constexpr (C::kGroups == 2) {
    const uint32_t mine = smem + C::kHalves + (half * kStageTokens + row + lane / 4) * 16;
    const uint32_t other = smem + C::kHalves + ((1 - half) * kStageTokens + row + lane / 4) * 16;
    VD_UNROLL for (int r = 0; r < 2; ++r) {
      if (lane % 4 == 0)
        arch::sts128(mine + r * 8 * 16, uint4{arch::as_uint(s.top[r]), arch::as_uint(plus[r]), arch::as_uint(s.low[r]),
                                              arch::as_uint(minus[r])});
    }
    arch::syncthreads();
    VD_UNROLL for (int r = 0; r < 2; ++r) {
      const uint4 v = arch::lds128(other + r * 8 * 16);
      const float top = fmaxf(s.top[r], arch::as_float(v.x)), low = fminf(s.low[r], arch::as_float(v.z));
      const float a = arch::ex2(s.top[r] - top), b = arch::ex2(low - s.low[r]);
      scale_p[r] = a / (plus[r] * a + arch::as_float(v.y) * arch::ex2(arch::as_float(v.x) - top));
      scale_m[r] = b / (minus[r] * b + arch::as_float(v.w) * arch::ex2(low - arch::as_float(v.z)));
    }
  }
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const int token = row + lane / 4 + 8 * r;
    VD_UNROLL for (int n = 0; n < 8; ++n) {
      const int chunk = half * 8 + n;
      const uint32_t to = smem + C::kPhi + lane % 4 * 4;
      arch::sts32(to + chunk_offset<2 * C::kChunks>(token, chunk),
                  arch::pack<T>(y[n][2 * r] * scale_p[r], y[n][2 * r + 1] * scale_p[r]));
      arch::sts32(to + chunk_offset<2 * C::kChunks>(token, C::kChunks + chunk),
                  arch::pack<T>(m[n][2 * r] * scale_m[r], m[n][2 * r + 1] * scale_m[r]));
    }
  }
}

// A warp's part of the state: 16 * kTiles features, 64 columns, and the sums of some of these features.
template <class T, int kDim, bool kHedgehog>
struct Accumulator {
  using C = StateConfig<kDim, kHedgehog>;
  static constexpr int kRowChunks = C::kFeatures / 8;
  float state[C::kTiles][8][4], sums[C::kSumTiles][4];

  VD_STATIC_METHOD int first_tile() { return threadIdx.x / 32 % 4 * C::kTiles; }
  VD_STATIC_METHOD int group() { return threadIdx.x / 32 / 4; }
  VD_STATIC_METHOD bool sums_tile(int m) { return m / C::kSumTiles == group(); }

  VD_METHOD void clear() {
    VD_UNROLL for (int m = 0; m < C::kTiles; ++m) VD_UNROLL for (int n = 0; n < 8; ++n)
        VD_UNROLL for (int c = 0; c < 4; ++c) state[m][n][c] = 0.f;
    VD_UNROLL for (int m = 0; m < C::kSumTiles; ++m) VD_UNROLL for (int c = 0; c < 4; ++c) sums[m][c] = 0.f;
  }

  VD_STATIC_METHOD void load_left(FeatureMap map, uint32_t phi, int tokens, int m, uint32_t (&a)[4]) {
    const int lane = threadIdx.x % 32;
    const int row = lane % 8 + lane / 16 * 8, chunk = (first_tile() + m) * 2 + lane / 8 % 2;
    arch::ldsm4t(phi + chunk_offset<kRowChunks>(row, chunk) + tokens * kRowChunks * 16, a);
    if constexpr (!kHedgehog) {
      VD_UNROLL for (int i = 0; i < 4; ++i) a[i] = mapped_pair<T>(map, a[i]);
    }
  }

  // phi, den: features of the values' and of the denominator's tokens, of which `valid` exist.
  VD_METHOD void add(FeatureMap map, uint32_t phi, uint32_t den, uint32_t v, int valid) {
    const int lane = threadIdx.x % 32;
    VD_UNROLL for (int k = 0; k < kStageTokens / 16; ++k) {
      uint32_t a[C::kTiles][4];
      VD_UNROLL for (int m = 0; m < C::kTiles; ++m) load_left(map, phi, k * 16, m, a[m]);
      VD_UNROLL for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_right<C::kChunks>(v, k * 16, group() * 4 + n, b);
        VD_UNROLL for (int m = 0; m < C::kTiles; ++m) {
          arch::mma<T>(state[m][2 * n], a[m], b[0], b[1]);
          arch::mma<T>(state[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
      const int token = k * 16 + 2 * (lane % 4);
      const uint32_t low = arch::pack<T>(token < valid ? 1.f : 0.f, token + 1 < valid ? 1.f : 0.f);
      const uint32_t high = arch::pack<T>(token + 8 < valid ? 1.f : 0.f, token + 9 < valid ? 1.f : 0.f);
      VD_UNROLL for (int m = 0; m < C::kTiles; ++m) {
        if (!sums_tile(m)) continue;
        if (den != phi) load_left(map, den, k * 16, m, a[m]);
        arch::mma<T>(sums[m % C::kSumTiles], a[m], low, high);
      }
    }
  }

  VD_METHOD void store(const LinearStateParams& p, float* to) const {
    const int lane = threadIdx.x % 32;
    VD_UNROLL for (int m = 0; m < C::kTiles; ++m) {
      VD_UNROLL for (int r = 0; r < 2; ++r) {
        const int padded = (first_tile() + m) * 16 + lane / 4 + 8 * r;
        const int column = kHedgehog ? padded % kDim : padded;
        if (column >= p.dim) continue;
        float* row = to + int64_t(padded / kDim * p.dim + column) * (p.dim_v + 1);
        VD_UNROLL for (int n = 0; n < 8; ++n) {
          VD_UNROLL for (int c = 0; c < 2; ++c) {
            const int at = group() * 64 + 8 * n + 2 * (lane % 4) + c;
            if (at < p.dim_v) row[at] = state[m][n][2 * r + c];
          }
        }
        if (sums_tile(m) && lane % 4 == 0) row[p.dim_v] = sums[m % C::kSumTiles][2 * r];
      }
    }
  }
};

template <class T, int kDim, bool kHedgehog>
VD_KERNEL((StateConfig<kDim, kHedgehog>::kThreads), (StateConfig<kDim, kHedgehog>::kMinBlocks))
state_matrix(const VD_GRID_CONST StateArgs a) {
  using C = StateConfig<kDim, kHedgehog>;
  const LinearStateParams& p = a.p;
  VD_DYN_SMEM(raw);
  const uint32_t smem = arch::smem_u32(raw);
  const int32_t part = int32_t(blockIdx.x) % a.splits, sequence = int32_t(blockIdx.x) / a.splits;
  const int32_t batch = sequence / p.heads, head = sequence % p.heads;
  const int32_t valid = valid_tokens(p.kv_len, batch, p.length);
  const int32_t begin = int32_t(int64_t(a.stages) * part / a.splits);
  int32_t end = int32_t(int64_t(a.stages) * (part + 1) / a.splits);
  if (end > (valid + kStageTokens - 1) / kStageTokens) end = (valid + kStageTokens - 1) / kStageTokens;
  auto load = [&](const TokenRows& x, int32_t stage, int32_t dim, uint32_t to) {
    load_stage<kDim, kHedgehog>(x, batch, head, stage * kStageTokens, valid, dim, to);
  };
  Accumulator<T, kDim, kHedgehog> acc;
  acc.clear();

  if constexpr (kHedgehog) {
    load_weight<T, kDim>(p.weight, head, p.dim, smem, C::kThreads);
    if (begin < end) load(p.k, begin, p.dim, smem + C::kK);
    arch::cp_async_commit();
    for (int32_t j = begin; j < end; ++j) {
      arch::cp_async_wait<0>();
      arch::syncthreads();
      load(p.v, j, p.dim_v, smem + C::kV);
      arch::cp_async_commit();
      store_features<T, kDim>(smem, p.dim);
      arch::cp_async_wait<0>();
      arch::syncthreads();
      if (j + 1 < end) load(p.k, j + 1, p.dim, smem + C::kK);
      arch::cp_async_commit();
      acc.add(p.map, smem + C::kPhi, smem + C::kPhi, smem + C::kV, valid - j * kStageTokens);
    }
  } else {
    const uint32_t buffer = (p.k_den.data != nullptr ? 3 : 2) * C::kTile, den_at = p.k_den.data != nullptr ? 2 : 0;
    auto load_all = [&](int32_t stage) {
      const uint32_t to = smem + (stage - begin) % 2 * buffer;
      load(p.k, stage, p.dim, to);
      load(p.v, stage, p.dim_v, to + C::kTile);
      if (den_at != 0) load(p.k_den, stage, p.dim, to + den_at * C::kTile);
      arch::cp_async_commit();
    };
    if (begin < end) load_all(begin);
    for (int32_t j = begin; j < end; ++j) {
      arch::cp_async_wait<0>();
      arch::syncthreads();
      if (j + 1 < end) load_all(j + 1);
      const uint32_t from = smem + (j - begin) % 2 * buffer;
      acc.add(p.map, from, from + den_at * C::kTile, from + C::kTile, valid - j * kStageTokens);
    }
  }
  const int64_t floats = int64_t(feature_count(p.map, p.dim)) * (p.dim_v + 1);
  acc.store(p, a.to + (int64_t(part) * p.batch * p.heads + sequence) * floats);
}

template <class T, int kDim, bool kHedgehog>
int launch_state_matrix(const StateArgs& a, arch::stream_t stream) {
  using C = StateConfig<kDim, kHedgehog>;
  const int64_t blocks = int64_t(a.p.batch) * a.p.heads * a.splits;
  if (blocks > INT32_MAX) return kInvalid;
  const uint32_t bytes = kHedgehog ? C::kHedgehogBytes : 2 * (a.p.k_den.data != nullptr ? 3 : 2) * C::kTile;
  return arch::launch(state_matrix<T, kDim, kHedgehog>, dim3(unsigned(blocks)), dim3(C::kThreads), bytes, stream, a);
}

}  // namespace vdit::gpu::linear

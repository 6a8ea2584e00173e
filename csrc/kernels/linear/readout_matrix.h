// Rows of linear attention on tensor cores: phi(q) times a state, compute capability 8.0 and newer (mma.sync).
//
// A CTA has a part of one head's queries. W, the state in 16 bits and its sums are brought to shared memory once; then
// every warp goes through tiles of 16 rows on its own: query rows come from global memory as fragments, those of the
// next tile while this one is multiplied, and go there as 16-byte pieces. No barrier after the first.
//
// A fragment wants columns {2t, 2t+1, 2t+8, 2t+9} of 16 for lane t of a quad, but 16 bytes hold {8t ... 8t+7} of 32.
// The order of a contraction is free, and so is that of result columns: rows of the right operand are stored in the
// order in which the fragments hold q, and columns of the state so that a lane's results are neighbours.
//
// The right operand has 2 * kDim rows whatever the map: hedgehog has that many features; of the others every feature
// has two rows, the rounded state and what rounding left over, so that their error does not add to that of few
// features.
#pragma once
#include <type_traits>

#include "kernels/linear/tile.h"

namespace vdit::gpu::linear {

struct ReadoutArgs {
  LinearReadoutParams p;
  int32_t parts, tiles;  // of 16 rows
};

template <int kDim, bool kHedgehog>
struct ReadoutConfig {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps, kChunks = kDim / 8;
  static constexpr int kGroups = kDim / 32;                            // of 32 columns: a lane has 8 neighbours of each
  static constexpr uint32_t kState = kHedgehog ? kDim * kDim * 2 : 0;  // behind W
  static constexpr uint32_t kSums = kState + 2 * kDim * kDim * 2, kMost = kSums + 2 * kDim * 4;
  static constexpr uint32_t kBytes = kMost + kWarps * 4;  // W, state, sums, maxima of the warps
  static constexpr int kMinBlocks = kDim > 64 ? 1 : 2;
};

// Which column of q is row r of the right operand.
VD_DEV int fragment_column(int r) { return r / 32 * 32 + r % 8 / 2 * 8 + r % 32 / 16 * 4 + r / 8 % 2 * 2 + r % 2; }

// Which column of the values stands at column c of the state in shared memory.
VD_DEV int result_column(int c) { return c / 32 * 32 + c % 8 / 2 * 8 + c / 8 % 4 * 2 + c % 2; }

// A power of two that brings the state into the range of T; the same in every thread.
template <class T, int kWarps>
VD_DEV float state_scale(const LinearReadoutParams& p, const float* state, uint32_t most_at) {
  if constexpr (std::is_same_v<T, arch::BF16>) return 1.f;
  const int features = feature_count(p.map, p.dim), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float most = 0.f;
  for (int f = warp; f < features; f += kWarps)
    for (int c = lane; c < p.dim_v; c += 32) most = fmaxf(most, fabsf(state[int64_t(f) * (p.dim_v + 1) + c]));
  VD_UNROLL for (int step = 16; step > 0; step /= 2) most = fmaxf(most, arch::shfl_xor_f(most, step));
  if (lane == 0) arch::sts32(most_at + warp * 4, arch::as_uint(most));
  arch::syncthreads();
  VD_UNROLL for (int w = 0; w < kWarps; ++w) most = fmaxf(most, arch::as_float(arch::lds32(most_at + w * 4)));
  const int exponent = int(arch::as_uint(most) >> 23) - 127;
  if (exponent > 113 || exponent < -110) return 1.f;  // 0, or beyond what a product could mend
  return arch::as_float(uint32_t(127 + 13 - exponent) << 23);
}

// W, the state and its sums to shared memory.
template <class T, int kDim, bool kHedgehog>
VD_DEV void load_operands(const LinearReadoutParams& p, int32_t head, const float* state, float scale, uint32_t smem) {
  using C = ReadoutConfig<kDim, kHedgehog>;
  if constexpr (kHedgehog) {
    for (int i = threadIdx.x; i < kDim * C::kChunks; i += C::kThreads) {
      const int row = i / C::kChunks, column = i % C::kChunks * 8, from = fragment_column(row);
      uint32_t pair[4] = {0, 0, 0, 0};
      if (from < p.dim && column < p.dim) {
        VD_UNROLL for (int e = 0; e < 4; ++e) pair[e] = arch::pack<T>(
            weight_at(p.weight, head, from, column + 2 * e), weight_at(p.weight, head, from, column + 2 * e + 1));
      }
      arch::sts128(smem + chunk_offset<C::kChunks>(row, column / 8), uint4{pair[0], pair[1], pair[2], pair[3]});
    }
  }
  for (int i = threadIdx.x; i < 2 * kDim * C::kChunks; i += C::kThreads) {
    const int row = i / C::kChunks, chunk = i % C::kChunks;
    const int column = kHedgehog ? row % kDim : fragment_column(row % kDim);  // of q
    const float* from = state + int64_t((kHedgehog ? row / kDim * p.dim : 0) + column) * (p.dim_v + 1);
    uint32_t pair[4];
    VD_UNROLL for (int e = 0; e < 4; ++e) {
      float x[2];
      VD_UNROLL for (int c = 0; c < 2; ++c) {
        const int at = result_column(chunk * 8 + 2 * e + c);
        x[c] = column < p.dim && at < p.dim_v ? from[at] * scale : 0.f;
      }
      pair[e] = arch::pack<T>(x[0], x[1]);
      if (!kHedgehog && row >= kDim) {
        float rounded[2];
        arch::unpack<T>(pair[e], rounded[0], rounded[1]);
        pair[e] = arch::pack<T>(x[0] - rounded[0], x[1] - rounded[1]);
      }
    }
    arch::sts128(smem + C::kState + chunk_offset<C::kChunks>(row, chunk), uint4{pair[0], pair[1], pair[2], pair[3]});
  }
  for (int i = threadIdx.x; i < (kHedgehog ? 2 : 1) * kDim; i += C::kThreads) {
    const int column = i % kDim;
    const float z = column < p.dim ? state[int64_t(i / kDim * p.dim + column) * (p.dim_v + 1) + p.dim_v] : 0.f;
    arch::sts32(smem + C::kSums + i * 4, arch::as_uint(z));
  }
}

// Rows lane / 4 and lane / 4 + 8 of a tile: lane t of a quad has columns 32 g + 8 t + {0 ... 7}, two per register.
template <int kDim>
using QueryRows = uint32_t[2][kDim / 32][4];

template <int kDim>
VD_DEV void load_queries(const LinearReadoutParams& p, const TokenRows& x, int32_t batch, int32_t head, int64_t first,
                         QueryRows<kDim>& q) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const int64_t row = first + lane / 4 + 8 * r;
    const auto* from = static_cast<const uint16_t*>(x.data) + row_offset(x, batch, head, row);
    VD_UNROLL for (int g = 0; g < kDim / 32; ++g) {
      const int column = g * 32 + lane % 4 * 8;
      uint4 v{0, 0, 0, 0};
      if (row < p.length && column < p.dim) v = arch::ldg128_stream(from + column);
      q[r][g][0] = v.x, q[r][g][1] = v.y, q[r][g][2] = v.z, q[r][g][3] = v.w;
    }
  }
}

// Step k of 16 columns as the left operand.
template <int kDim>
VD_DEV void query_fragment(const QueryRows<kDim>& q, int k, uint32_t (&a)[4]) {
  VD_UNROLL for (int i = 0; i < 4; ++i) a[i] = q[i % 2][k / 2][k % 2 * 2 + i / 2];
}

// factor[r] = 1 / (features . sums + eps), or 0. lane_sums[r]: what this lane has of the product.
VD_DEV void make_factors(const float (&lane_sums)[2], float eps, float (&factor)[2]) {
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const float total = quad_sum(lane_sums[r]) + eps;
    factor[r] = total == 0.f ? 0.f : 1.f / total;
  }
}

template <class T, int kDim>
VD_DEV void map_rows(FeatureMap map, QueryRows<kDim>& q) {
  VD_UNROLL for (int r = 0; r < 2; ++r) VD_UNROLL for (int g = 0; g < kDim / 32; ++g)
      VD_UNROLL for (int e = 0; e < 4; ++e) q[r][g][e] = mapped_pair<T>(map, q[r][g][e]);
}

template <class T, int kDim>
VD_DEV void denominators(const QueryRows<kDim>& phi, uint32_t sums, float eps, float (&factor)[2]) {
  float total[2] = {0.f, 0.f};
  VD_UNROLL for (int g = 0; g < kDim / 32; ++g) {
    VD_UNROLL for (int half = 0; half < 2; ++half) {
      const uint4 v = arch::lds128(sums + (g * 32 + threadIdx.x % 4 * 8 + half * 4) * 4);
      const float z[4] = {arch::as_float(v.x), arch::as_float(v.y), arch::as_float(v.z), arch::as_float(v.w)};
      VD_UNROLL for (int r = 0; r < 2; ++r) {
        VD_UNROLL for (int e = 0; e < 2; ++e) {
          float low, high;
          arch::unpack<T>(phi[r][g][half * 2 + e], low, high);
          total[r] = fmaf(low, z[2 * e], total[r]);
          total[r] = fmaf(high, z[2 * e + 1], total[r]);
        }
      }
    }
  }
  make_factors(total, eps, factor);
}

// Features of 16 rows, packed as left operands: kDim of softmax(q W), then kDim of softmax(-q W).
template <class T, int kDim>
VD_DEV void hedgehog_features(const QueryRows<kDim>& q, int32_t dim, uint32_t weight, uint32_t (&phi)[kDim / 8][4]) {
  constexpr int kChunks = kDim / 8;
  const int lane = threadIdx.x % 32;
  float y[kDim / 8][4] = {};
  VD_UNROLL for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[4];
    query_fragment<kDim>(q, k, a);
    VD_UNROLL for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      arch::ldsm4t(weight + chunk_offset<kChunks>(k * 16 + lane % 16, 2 * n + lane / 16), b);
      arch::mma<T>(y[2 * n], a, b[0], b[1]);
      arch::mma<T>(y[2 * n + 1], a, b[2], b[3]);
    }
  }
  SignedSoftmax<kDim / 8> s(y);
  s.run(0, dim);
  float scale[2][2];
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    scale[0][r] = 1.f / s.plus[r];
    scale[1][r] = 1.f / s.minus[r];
  }
  VD_UNROLL for (int k = 0; k < kDim / 16; ++k) {
    VD_UNROLL for (int i = 0; i < 4; ++i) {
      const int n = 2 * k + i / 2, r = i % 2;
      phi[k][i] = arch::pack<T>(s.p[n][2 * r] * scale[0][r], s.p[n][2 * r + 1] * scale[0][r]);
      phi[kDim / 16 + k][i] = arch::pack<T>(s.m[n][2 * r] * scale[1][r], s.m[n][2 * r + 1] * scale[1][r]);
    }
  }
}

template <class T, int kDim>
VD_DEV void denominators(const uint32_t (&phi)[kDim / 8][4], uint32_t sums, float eps, float (&factor)[2]) {
  float total[2] = {0.f, 0.f};
  VD_UNROLL for (int k = 0; k < kDim / 8; ++k) {
    VD_UNROLL for (int half = 0; half < 2; ++half) {
      const uint2 z = arch::lds64(sums + (k * 16 + half * 8 + threadIdx.x % 4 * 2) * 4);
      VD_UNROLL for (int r = 0; r < 2; ++r) {
        float low, high;
        arch::unpack<T>(phi[k][2 * half + r], low, high);
        total[r] = fmaf(low, arch::as_float(z.x), total[r]);
        total[r] = fmaf(high, arch::as_float(z.y), total[r]);
      }
    }
  }
  make_factors(total, eps, factor);
}

// o += a times 16 rows of the state, from row `row` on.
template <class T, int kDim>
VD_DEV void multiply_state(float (&o)[kDim / 8][4], const uint32_t (&a)[4], uint32_t state, int row) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int n = 0; n < kDim / 16; ++n) {
    uint32_t b[4];
    arch::ldsm4t(state + chunk_offset<kDim / 8>(row + lane % 16, 2 * n + lane / 16), b);
    arch::mma<T>(o[2 * n], a, b[0], b[1]);
    arch::mma<T>(o[2 * n + 1], a, b[2], b[3]);
  }
}

template <class T, int kDim>
VD_DEV void store_tile(const LinearReadoutParams& p, int32_t batch, int32_t head, int64_t first,
                       const float (&o)[kDim / 8][4], const float (&factor)[2]) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const int64_t row = first + lane / 4 + 8 * r;
    if (row >= p.length) continue;
    uint16_t* to = static_cast<uint16_t*>(p.out) + ((batch * int64_t(p.length) + row) * p.heads + head) * p.dim_v;
    VD_UNROLL for (int g = 0; g < kDim / 32; ++g) {
      const int column = g * 32 + lane % 4 * 8;
      if (column >= p.dim_v) continue;
      uint32_t pair[4];
      VD_UNROLL for (int n = 0; n < 4; ++n) {
        const float* x = &o[g * 4 + n][2 * r];
        pair[n] = factor[r] == 0.f ? 0u : arch::pack<T>(x[0] * factor[r], x[1] * factor[r]);
      }
      arch::stg128(to + column, uint4{pair[0], pair[1], pair[2], pair[3]});
    }
  }
}

template <class T, int kDim, bool kHedgehog>
VD_KERNEL((ReadoutConfig<kDim, kHedgehog>::kThreads), (ReadoutConfig<kDim, kHedgehog>::kMinBlocks))
readout_matrix(const VD_GRID_CONST ReadoutArgs a) {
  using C = ReadoutConfig<kDim, kHedgehog>;
  const LinearReadoutParams& p = a.p;
  VD_DYN_SMEM(raw);
  const uint32_t smem = arch::smem_u32(raw), sums = smem + C::kSums;
  const int32_t part = int32_t(blockIdx.x) % a.parts, sequence = int32_t(blockIdx.x) / a.parts;
  const int32_t batch = sequence / p.heads, head = sequence % p.heads, kv_head = head / (p.heads / p.kv_heads);
  const int32_t features = feature_count(p.map, p.dim);
  const float* state = p.state + (int64_t(batch) * p.kv_heads + kv_head) * features * (p.dim_v + 1);
  const float scale = state_scale<T, C::kWarps>(p, state, smem + C::kMost);
  load_operands<T, kDim, kHedgehog>(p, head, state, scale, smem);
  arch::syncthreads();

  const int32_t warp = threadIdx.x / 32, end = int32_t(int64_t(a.tiles) * (part + 1) / a.parts);
  int32_t tile = int32_t(int64_t(a.tiles) * part / a.parts) + warp;
  QueryRows<kDim> next;
  if (tile < end) load_queries<kDim>(p, p.q, batch, head, int64_t(tile) * 16, next);
  for (; tile < end; tile += C::kWarps) {
    const int64_t first = int64_t(tile) * 16;
    float o[kDim / 8][4] = {}, factor[2];
    if constexpr (kHedgehog) {
      uint32_t phi[kDim / 8][4];
      hedgehog_features<T, kDim>(next, p.dim, smem, phi);
      if (tile + C::kWarps < end) load_queries<kDim>(p, p.q, batch, head, first + 16 * C::kWarps, next);
      denominators<T, kDim>(phi, sums, p.eps, factor);
      VD_UNROLL for (int k = 0; k < kDim / 8; ++k) multiply_state<T, kDim>(o, phi[k], smem + C::kState, k * 16);
    } else {
      QueryRows<kDim> phi;
      if (p.q_den.data != nullptr) {
        load_queries<kDim>(p, p.q_den, batch, head, first, phi);
        map_rows<T, kDim>(p.map, phi);
        denominators<T, kDim>(phi, sums, p.eps, factor);
      }
      map_rows<T, kDim>(p.map, next);
      VD_UNROLL for (int r = 0; r < 2; ++r) VD_UNROLL for (int g = 0; g < C::kGroups; ++g)
          VD_UNROLL for (int e = 0; e < 4; ++e) phi[r][g][e] = next[r][g][e];
      if (tile + C::kWarps < end) load_queries<kDim>(p, p.q, batch, head, first + 16 * C::kWarps, next);
      if (p.q_den.data == nullptr) denominators<T, kDim>(phi, sums, p.eps, factor);
      VD_UNROLL for (int k = 0; k < kDim / 16; ++k) {
        uint32_t left[4];
        query_fragment<kDim>(phi, k, left);
        multiply_state<T, kDim>(o, left, smem + C::kState, k * 16);
        multiply_state<T, kDim>(o, left, smem + C::kState, kDim + k * 16);
      }
    }
    VD_UNROLL for (int r = 0; r < 2; ++r) factor[r] /= scale;
    store_tile<T, kDim>(p, batch, head, first, o, factor);
  }
}

template <class T, int kDim, bool kHedgehog>
int launch_readout_matrix(const ReadoutArgs& a, arch::stream_t stream) {
  using C = ReadoutConfig<kDim, kHedgehog>;
  const int64_t blocks = int64_t(a.p.batch) * a.p.heads * a.parts;
  if (blocks > INT32_MAX) return kInvalid;
  return arch::launch(readout_matrix<T, kDim, kHedgehog>, dim3(unsigned(blocks)), dim3(C::kThreads), C::kBytes, stream,
                      a);
}

}  // namespace vdit::gpu::linear

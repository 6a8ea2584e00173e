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
// Softmaxes of hedgehog stay exponentials: results of the first half are scaled by the ratio of both sums before those
// of the second are added, so that no row of exponentials waits in fp32 for its sum.
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
  static constexpr int kWarps = kDim / 16, kThreads = 32 * kWarps, kChunks = kDim / 8;
  static constexpr uint32_t kState = kHedgehog ? kDim * kDim * 2 : 0;  // behind W
  static constexpr uint32_t kSums = kState + 2 * kDim * kDim * 2, kMost = kSums + 2 * kDim * 4;
  static constexpr uint32_t kEps = kMost + kWarps * 4;
  static constexpr uint32_t kBytes = kEps + 16;  // W, state, sums, maxima of the warps, eps
  static constexpr int kMinBlocks = kDim > 64 ? 1 : 3;
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
  if (exponent > 73 || exponent < -48) return 1.f;  // 0, or no sum of fp16 values
  return arch::as_float(uint32_t(127 + 13 - exponent) << 23);
}

// W, the state, its sums and eps to shared memory; all but W times `scale`, which the quotient loses again.
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
    arch::sts32(smem + C::kSums + i * 4, arch::as_uint(z * scale));
  }
  if (threadIdx.x == 0) arch::sts32(smem + C::kEps, arch::as_uint(p.eps * scale));
}

// Rows lane / 4 and lane / 4 + 8 of a tile: lane t of a quad has columns 32 g + 8 t + {0 ... 7}, two per register.
template <int kDim>
using QueryRows = uint32_t[2][kDim / 32][4];

// Where this lane's first column lies in row lane / 4 of the first tile.
VD_DEV const uint16_t* lane_address(const TokenRows& x, int32_t batch, int32_t head) {
  const int lane = threadIdx.x % 32;
  return static_cast<const uint16_t*>(x.data) + row_offset(x, batch, head, lane / 4) + lane % 4 * 8;
}

template <int kDim>
VD_DEV void load_queries(const LinearReadoutParams& p, const uint16_t* from, int64_t row_stride, int32_t first,
                         QueryRows<kDim>& q) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const bool exists = first + lane / 4 + 8 * r < p.length;
    VD_UNROLL for (int g = 0; g < kDim / 32; ++g) {
      uint4 v{0, 0, 0, 0};
      if (exists && g * 32 + lane % 4 * 8 < p.dim)
        v = arch::ldg128_stream(from + (first + 8 * r) * row_stride + g * 32);
      q[r][g][0] = v.x, q[r][g][1] = v.y, q[r][g][2] = v.z, q[r][g][3] = v.w;
    }
  }
}

// Step k of 16 columns as the left operand. It is copied once, by the fence: the compiler would do so for every
// product.
template <int kDim>
VD_DEV void query_fragment(const QueryRows<kDim>& q, int k, uint32_t (&a)[4]) {
  VD_UNROLL for (int i = 0; i < 4; ++i) a[i] = q[i % 2][k / 2][k % 2 * 2 + i / 2];
}

// factor[r] = 1 / (features . sums + eps), or 0. lane_sums[r]: what this lane has of the product.
VD_DEV void make_factors(const float (&lane_sums)[2], uint32_t eps_at, float (&factor)[2]) {
  const float eps = arch::as_float(arch::lds32(eps_at));
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

// total += the two values of a pair times the entries of z.
template <class T>
VD_DEV void add_pair(uint32_t pair, uint2 z, float& total) {
  float low, high;
  arch::unpack<T>(pair, low, high);
  total = fmaf(low, arch::as_float(z.x), total);
  total = fmaf(high, arch::as_float(z.y), total);
}

template <class T, int kDim>
VD_DEV void denominators(const QueryRows<kDim>& phi, uint32_t sums, uint32_t eps_at, float (&factor)[2]) {
  float total[2] = {0.f, 0.f};
  VD_UNROLL for (int g = 0; g < kDim / 32; ++g) {
    VD_UNROLL for (int e = 0; e < 4; ++e) {
      const uint2 z = arch::lds64(sums + (g * 32 + threadIdx.x % 4 * 8 + e * 2) * 4);
      VD_UNROLL for (int r = 0; r < 2; ++r) add_pair<T>(phi[r][g][e], z, total[r]);
    }
  }
  make_factors(total, eps_at, factor);
}

// What makes softmaxes of a lane's exponentials: 1 / sum per row and sign; and the rows' products with the state's
// sums.
struct HedgehogRows {
  float plus[2], minus[2], total[2];
};

// Exponentials of 16 rows, packed as left operands: kDim of q W, then kDim of -q W.
template <class T, int kDim>
VD_DEV HedgehogRows hedgehog_features(const QueryRows<kDim>& q, int32_t dim, uint32_t weight, uint32_t sums,
                                      uint32_t (&phi)[kDim / 8][4]) {
  constexpr int kChunks = kDim / 8;
  const int lane = threadIdx.x % 32;
  float y[kDim / 8][4] = {};
  VD_UNROLL for (int k = 0; k < kDim / 16; ++k) {
    uint32_t a[4];
    query_fragment<kDim>(q, k, a);
    VD_UNROLL for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      load_right<kChunks>(weight, k * 16, n, b);
      arch::mma<T>(y[2 * n], a, b[0], b[1]);
      arch::mma<T>(y[2 * n + 1], a, b[2], b[3]);
    }
  }
  const SignedScores<kDim / 8> s(y, 0, dim);
  float sum_p[2] = {0.f, 0.f}, sum_m[2] = {0.f, 0.f}, total_p[2] = {0.f, 0.f}, total_m[2] = {0.f, 0.f};
  VD_UNROLL for (int n = 0; n < kDim / 8; ++n) {
    const uint2 z_p = arch::lds64(sums + (n * 8 + lane % 4 * 2) * 4);
    const uint2 z_m = arch::lds64(sums + (kDim + n * 8 + lane % 4 * 2) * 4);
    VD_UNROLL for (int r = 0; r < 2; ++r) {
      const float p[2] = {s.plus(n, 2 * r), s.plus(n, 2 * r + 1)}, m[2] = {s.minus(n, 2 * r), s.minus(n, 2 * r + 1)};
      sum_p[r] += p[0] + p[1];
      sum_m[r] += m[0] + m[1];
      phi[n / 2][n % 2 * 2 + r] = arch::pack<T>(p[0], p[1]);
      phi[kDim / 16 + n / 2][n % 2 * 2 + r] = arch::pack<T>(m[0], m[1]);
      add_pair<T>(phi[n / 2][n % 2 * 2 + r], z_p, total_p[r]);
      add_pair<T>(phi[kDim / 16 + n / 2][n % 2 * 2 + r], z_m, total_m[r]);
    }
  }
  HedgehogRows rows;
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    rows.plus[r] = 1.f / quad_sum(sum_p[r]);
    rows.minus[r] = 1.f / quad_sum(sum_m[r]);
    rows.total[r] = total_p[r] * rows.plus[r] + total_m[r] * rows.minus[r];
  }
  return rows;
}

template <int kTiles>
VD_DEV void clear(float (&o)[kTiles][4]) {
  VD_UNROLL for (int n = 0; n < kTiles; ++n) VD_UNROLL for (int c = 0; c < 4; ++c) o[n][c] = 0.f;
}

// o += a times 16 rows of the state, from row `row` on.
template <class T, int kDim>
VD_DEV void multiply_state(float (&o)[kDim / 8][4], const uint32_t (&a)[4], uint32_t state, int row) {
  VD_UNROLL for (int n = 0; n < kDim / 16; ++n) {
    uint32_t b[4];
    load_right<kDim / 8>(state, row, n, b);
    arch::mma<T>(o[2 * n], a, b[0], b[1]);
    arch::mma<T>(o[2 * n + 1], a, b[2], b[3]);
  }
}

// `to`: this lane's first column of row lane / 4 of the first tile.
template <class T, int kDim>
VD_DEV void store_tile(const LinearReadoutParams& p, uint16_t* to, int32_t first, const float (&o)[kDim / 8][4],
                       const float (&factor)[2]) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    if (first + lane / 4 + 8 * r >= p.length) continue;
    VD_UNROLL for (int g = 0; g < kDim / 32; ++g) {
      if (g * 32 + lane % 4 * 8 >= p.dim_v) continue;
      uint32_t pair[4];
      VD_UNROLL for (int n = 0; n < 4; ++n) {
        const float* x = &o[g * 4 + n][2 * r];
        pair[n] = factor[r] == 0.f ? 0u : arch::pack<T>(x[0] * factor[r], x[1] * factor[r]);
      }
      arch::stg128(to + int64_t(first + 8 * r) * p.heads * p.dim_v + g * 32, uint4{pair[0], pair[1], pair[2], pair[3]});
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

  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint16_t* const from = lane_address(p.q, batch, head);
  uint16_t* const to = static_cast<uint16_t*>(p.out) +
                       ((int64_t(batch) * p.length + lane / 4) * p.heads + head) * p.dim_v + lane % 4 * 8;
  const int32_t end = int32_t(int64_t(a.tiles) * (part + 1) / a.parts);
  int32_t tile = int32_t(int64_t(a.tiles) * part / a.parts) + warp;
  QueryRows<kDim> next;
  auto load_next = [&](int32_t index) {
    if (index < end) load_queries<kDim>(p, from, p.q.row_stride, index * 16, next);
  };
  load_next(tile);
  for (; tile < end; tile += C::kWarps) {
    float o[kDim / 8][4], factor[2];
    if constexpr (kHedgehog) {
      uint32_t phi[kDim / 8][4];
      const HedgehogRows rows = hedgehog_features<T, kDim>(next, p.dim, smem, sums, phi);
      make_factors(rows.total, smem + C::kEps, factor);
      clear(o);
      VD_UNROLL for (int k = 0; k < kDim / 16; ++k) multiply_state<T, kDim>(o, phi[k], smem + C::kState, k * 16);
      load_next(tile + C::kWarps);
      VD_UNROLL for (int r = 0; r < 2; ++r) {
        const float ratio = rows.plus[r] / rows.minus[r];
        VD_UNROLL for (int n = 0; n < kDim / 8; ++n) {
          o[n][2 * r] *= ratio;
          o[n][2 * r + 1] *= ratio;
        }
      }
      VD_UNROLL for (int k = kDim / 16; k < kDim / 8; ++k) multiply_state<T, kDim>(o, phi[k], smem + C::kState, k * 16);
      VD_UNROLL for (int r = 0; r < 2; ++r) factor[r] *= rows.minus[r];
    } else {
      QueryRows<kDim> phi;
      if (p.q_den.data != nullptr) {
        load_queries<kDim>(p, lane_address(p.q_den, batch, head), p.q_den.row_stride, tile * 16, phi);
        map_rows<T, kDim>(p.map, phi);
        denominators<T, kDim>(phi, sums, smem + C::kEps, factor);
      }
      map_rows<T, kDim>(p.map, next);
      VD_UNROLL for (int r = 0; r < 2; ++r) VD_UNROLL for (int g = 0; g < kDim / 32; ++g)
          VD_UNROLL for (int e = 0; e < 4; ++e) phi[r][g][e] = next[r][g][e];
      load_next(tile + C::kWarps);
      if (p.q_den.data == nullptr) denominators<T, kDim>(phi, sums, smem + C::kEps, factor);
      clear(o);
      VD_UNROLL for (int k = 0; k < kDim / 16; ++k) {
        uint32_t left[4];
        query_fragment<kDim>(phi, k, left);
        multiply_state<T, kDim>(o, left, smem + C::kState, k * 16);
        multiply_state<T, kDim>(o, left, smem + C::kState, kDim + k * 16);
      }
    }
    store_tile<T, kDim>(p, to, tile * 16, o, factor);
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

// Linear attention by multiply-add in fp32: every dtype, alignment and dim up to 256, and hedgehog with inputs of its
// own for the denominator. A CTA goes through 16 tokens at a time: rows to shared memory, features, product.
#pragma once
#include "kernels/linear/readout_matrix.h"
#include "kernels/linear/state_matrix.h"

namespace vdit::gpu::linear::plain {

constexpr int kThreads = 256, kTokens = 16, kDim = kLinearMaxDim;
constexpr uint32_t kX = 0, kPhi = kTokens * kDim * 4, kPhiPitch = 2 * kDim * 4;  // bytes
constexpr uint32_t kTail = kPhi + kTokens * kPhiPitch;
constexpr uint32_t kTailBytes = kTokens * 128 * 4;  // values of the state's kernel, denominators of the readout's
constexpr uint32_t kBytes = kTail + kTailBytes;

VD_DEV float shared_at(uint32_t at) { return arch::as_float(arch::lds32(at)); }
VD_DEV void put_shared(uint32_t at, float x) { arch::sts32(at, arch::as_uint(x)); }

struct Four {
  float x[4];
  VD_METHOD explicit Four(uint32_t at) {
    const uint4 v = arch::lds128(at);
    x[0] = arch::as_float(v.x), x[1] = arch::as_float(v.y), x[2] = arch::as_float(v.z), x[3] = arch::as_float(v.w);
  }
};

// `columns` columns of 16 rows from token `first` on, zeros from `end` and up to `padded` columns.
template <class T>
VD_DEV void load_rows(const TokenRows& x, int32_t batch, int32_t head, int64_t first, int64_t end, int first_column,
                      int columns, int padded, uint32_t to, uint32_t pitch) {
  for (int i = threadIdx.x; i < kTokens * padded; i += kThreads) {
    const int row = i / padded, column = i % padded;
    const bool inside = first + row < end && column < columns;
    const int64_t at = inside ? row_offset(x, batch, head, first + row) + first_column + column : 0;
    put_shared(to + row * pitch + column * 4, inside ? Scalar<T>::load(x.data, at) : 0.f);
  }
}

// Rows of x in shared memory become rows of x W.
VD_DEV void project(const LinearWeight& w, int32_t head, int dim, uint32_t smem) {
  const int column = threadIdx.x;
  float sum[kTokens] = {};
  if (column < dim) {
    for (int d = 0; d < dim; d += 4) {
      float weight[4];
      VD_UNROLL for (int e = 0; e < 4; ++e) weight[e] = d + e < dim ? weight_at(w, head, d + e, column) : 0.f;
      VD_UNROLL for (int t = 0; t < kTokens; ++t) {
        const Four x(smem + kX + (t * kDim + d) * 4);
        VD_UNROLL for (int e = 0; e < 4; ++e) sum[t] = fmaf(x.x[e], weight[e], sum[t]);
      }
    }
  }
  arch::syncthreads();
  if (column < dim) VD_UNROLL for (int t = 0; t < kTokens; ++t) put_shared(smem + kX + (t * kDim + column) * 4, sum[t]);
  arch::syncthreads();
}

// Both softmaxes of a row, by a warp.
VD_DEV void hedgehog_row(uint32_t x, int dim, uint32_t to) {
  const int lane = threadIdx.x % 32;
  float top = -INFINITY, low = INFINITY, plus = 0.f, minus = 0.f;
  for (int d = lane; d < dim; d += 32) {
    const float y = shared_at(x + d * 4) * kLog2e;
    top = fmaxf(top, y);
    low = fminf(low, y);
  }
  VD_UNROLL for (int step = 16; step > 0; step /= 2) {
    top = fmaxf(top, arch::shfl_xor_f(top, step));
    low = fminf(low, arch::shfl_xor_f(low, step));
  }
  for (int d = lane; d < dim; d += 32) {
    const float y = shared_at(x + d * 4) * kLog2e, p = arch::ex2(y - top), m = arch::ex2(low - y);
    plus += p;
    minus += m;
    put_shared(to + d * 4, p);
    put_shared(to + (dim + d) * 4, m);
  }
  VD_UNROLL for (int step = 16; step > 0; step /= 2) {
    plus += arch::shfl_xor_f(plus, step);
    minus += arch::shfl_xor_f(minus, step);
  }
  for (int d = lane; d < dim; d += 32) {
    put_shared(to + d * 4, shared_at(to + d * 4) / plus);
    put_shared(to + (dim + d) * 4, shared_at(to + (dim + d) * 4) / minus);
  }
}

// Features of 16 rows to shared memory, zeros up to a multiple of 4. Begins and ends with a barrier.
template <class T, class Params>
VD_DEV void features(const Params& p, const TokenRows& x, int32_t batch, int32_t head, int64_t first, int64_t end,
                     uint32_t smem) {
  arch::syncthreads();
  load_rows<T>(x, batch, head, first, end, 0, p.dim, (p.dim + 3) / 4 * 4, smem + kX, kDim * 4);
  arch::syncthreads();
  const int count = feature_count(p.map, p.dim), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (p.weight.data != nullptr) project(p.weight, head, p.dim, smem);
  for (int t = warp; t < kTokens; t += kThreads / 32) {
    const uint32_t from = smem + kX + t * kDim * 4, to = smem + kPhi + t * kPhiPitch;
    if (p.map == FeatureMap::hedgehog) {
      hedgehog_row(from, p.dim, to);
    } else {
      for (int d = lane; d < p.dim; d += 32) put_shared(to + d * 4, mapped(p.map, shared_at(from + d * 4)));
    }
    if (lane < (4 - count % 4) % 4) put_shared(to + (count + lane) * 4, 0.f);
  }
  arch::syncthreads();
}

// A CTA has all features and 16 * kValueGroups columns of values; a thread 8 features and 16 columns, as groups of 4.
// kValueGroups: 8 for up to 256 features, 4 for up to 512.
template <class T, int kValueGroups>
VD_KERNEL(kThreads, 1)
state(const VD_GRID_CONST StateArgs a) {
  constexpr int kColumns = 16 * kValueGroups, kFeatureStep = 4 * kThreads / kValueGroups;
  const LinearStateParams& p = a.p;
  VD_DYN_SMEM(raw);
  const uint32_t smem = arch::smem_u32(raw);
  const int32_t part = int32_t(blockIdx.x) % a.splits, sequence = int32_t(blockIdx.x) / a.splits;
  const int32_t batch = sequence / p.heads, head = sequence % p.heads;
  const int32_t count = feature_count(p.map, p.dim), first_column = int32_t(blockIdx.y) * kColumns;
  const int64_t valid = valid_tokens(p.kv_len, batch, p.length);
  const int64_t begin = int64_t(a.stages) * part / a.splits * kTokens;
  int64_t end = int64_t(a.stages) * (part + 1) / a.splits * kTokens;
  end = end < valid ? end : valid;
  const int feature = threadIdx.x / kValueGroups * 4, value = threadIdx.x % kValueGroups * 4;
  float acc[8][16] = {}, sums[2] = {0.f, 0.f};

  for (int64_t first = begin; first < end; first += kTokens) {
    const int rows = end - first < kTokens ? int(end - first) : kTokens;
    features<T>(p, p.k, batch, head, first, end, smem);
    const int left = p.dim_v - first_column;
    load_rows<T>(p.v, batch, head, first, end, first_column, left < kColumns ? left : kColumns, kColumns, smem + kTail,
                 kColumns * 4);
    arch::syncthreads();
    for (int t = 0; t < rows; ++t) {
      float phi[8];
      VD_UNROLL for (int i = 0; i < 2; ++i) {
        const int at = feature + i * kFeatureStep;
        const Four f(smem + kPhi + t * kPhiPitch + at * 4);
        VD_UNROLL for (int e = 0; e < 4; ++e) phi[4 * i + e] = f.x[e];
      }
      VD_UNROLL for (int j = 0; j < 4; ++j) {
        const Four v(smem + kTail + (t * kColumns + value + j * 4 * kValueGroups) * 4);
        VD_UNROLL for (int i = 0; i < 8; ++i) VD_UNROLL for (int e = 0; e < 4; ++e) acc[i][4 * j + e] =
            fmaf(phi[i], v.x[e], acc[i][4 * j + e]);
      }
    }
    if (blockIdx.y != 0) continue;
    if (p.k_den.data != nullptr) features<T>(p, p.k_den, batch, head, first, end, smem);
    VD_UNROLL for (int i = 0; i < 2; ++i) {
      const int f = threadIdx.x + i * kThreads;
      if (f >= count) continue;
      for (int t = 0; t < rows; ++t) sums[i] += shared_at(smem + kPhi + t * kPhiPitch + f * 4);
    }
  }

  float* to = a.to + (int64_t(part) * p.batch * p.heads + sequence) * count * (p.dim_v + 1);
  VD_UNROLL for (int i = 0; i < 8; ++i) {
    const int f = feature + i / 4 * kFeatureStep + i % 4;
    if (f >= count) continue;
    VD_UNROLL for (int j = 0; j < 16; ++j) {
      const int c = first_column + value + j / 4 * 4 * kValueGroups + j % 4;
      if (c < p.dim_v) to[int64_t(f) * (p.dim_v + 1) + c] = acc[i][j];
    }
  }
  if (blockIdx.y != 0) return;
  VD_UNROLL for (int i = 0; i < 2; ++i) {
    const int f = threadIdx.x + i * kThreads;
    if (f < count) to[int64_t(f) * (p.dim_v + 1) + p.dim_v] = sums[i];
  }
}

// factors[t] = 1 / (phi_t . sums + eps), or 0.
VD_DEV void denominators(const LinearReadoutParams& p, const float* state, int count, uint32_t smem) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int t = warp; t < kTokens; t += kThreads / 32) {
    float total = 0.f;
    for (int f = lane; f < count; f += 32)
      total = fmaf(shared_at(smem + kPhi + t * kPhiPitch + f * 4), state[int64_t(f) * (p.dim_v + 1) + p.dim_v], total);
    VD_UNROLL for (int step = 16; step > 0; step /= 2) total += arch::shfl_xor_f(total, step);
    total += p.eps;
    if (lane == 0) put_shared(smem + kTail + t * 4, total == 0.f ? 0.f : 1.f / total);
  }
  arch::syncthreads();
}

// kGroups: 256 / kGroups columns of values or more; a thread has one column of 16 / kGroups tokens.
template <class T, int kGroups>
VD_KERNEL(kThreads, 1)
readout(const VD_GRID_CONST ReadoutArgs a) {
  constexpr int kColumns = kThreads / kGroups, kRows = kTokens / kGroups;
  const LinearReadoutParams& p = a.p;
  VD_DYN_SMEM(raw);
  const uint32_t smem = arch::smem_u32(raw);
  const int32_t part = int32_t(blockIdx.x) % a.parts, sequence = int32_t(blockIdx.x) / a.parts;
  const int32_t batch = sequence / p.heads, head = sequence % p.heads, kv_head = head / (p.heads / p.kv_heads);
  const int32_t count = feature_count(p.map, p.dim), column = threadIdx.x % kColumns;
  const int32_t row = threadIdx.x / kColumns * kRows;
  const float* state = p.state + (int64_t(batch) * p.kv_heads + kv_head) * count * (p.dim_v + 1);
  const int32_t end = int32_t(int64_t(a.tiles) * (part + 1) / a.parts);
  for (int32_t tile = int32_t(int64_t(a.tiles) * part / a.parts); tile < end; ++tile) {
    const int64_t first = int64_t(tile) * kTokens;
    if (p.q_den.data != nullptr) {
      features<T>(p, p.q_den, batch, head, first, p.length, smem);
      denominators(p, state, count, smem);
    }
    features<T>(p, p.q, batch, head, first, p.length, smem);
    if (p.q_den.data == nullptr) denominators(p, state, count, smem);
    if (column < p.dim_v) {
      float out[kRows] = {};
      for (int f = 0; f < count; f += 4) {
        float s[4];
        VD_UNROLL for (int e = 0; e < 4; ++e) s[e] =
            f + e < count ? state[int64_t(f + e) * (p.dim_v + 1) + column] : 0.f;
        VD_UNROLL for (int t = 0; t < kRows; ++t) {
          const Four phi(smem + kPhi + (row + t) * kPhiPitch + f * 4);
          VD_UNROLL for (int e = 0; e < 4; ++e) out[t] = fmaf(phi.x[e], s[e], out[t]);
        }
      }
      VD_UNROLL for (int t = 0; t < kRows; ++t) {
        const float factor = shared_at(smem + kTail + (row + t) * 4);
        const int64_t at = ((batch * int64_t(p.length) + first + row + t) * p.heads + head) * p.dim_v + column;
        if (first + row + t < p.length) Scalar<T>::store(p.out, at, factor == 0.f ? 0.f : out[t] * factor);
      }
    }
  }
}

template <class T>
int launch_state(const StateArgs& a, arch::stream_t stream) {
  const bool wide = feature_count(a.p.map, a.p.dim) > 256;
  const int columns = wide ? 64 : 128;
  const int64_t blocks = int64_t(a.p.batch) * a.p.heads * a.splits;
  if (blocks > INT32_MAX) return kInvalid;
  const dim3 grid(unsigned(blocks), unsigned((a.p.dim_v + columns - 1) / columns));
  return arch::launch(wide ? state<T, 4> : state<T, 8>, grid, dim3(kThreads), kBytes, stream, a);
}

template <class T>
int launch_readout(const ReadoutArgs& a, arch::stream_t stream) {
  const int64_t blocks = int64_t(a.p.batch) * a.p.heads * a.parts;
  if (blocks > INT32_MAX) return kInvalid;
  const dim3 grid{unsigned(blocks)};
  return arch::launch(a.p.dim_v > 128  ? readout<T, 1>
                      : a.p.dim_v > 64 ? readout<T, 2>
                                       : readout<T, 4>,
                      grid, dim3(kThreads), kBytes, stream, a);
}

}  // namespace vdit::gpu::linear::plain

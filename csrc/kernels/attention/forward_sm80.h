// Forward attention, compute capability 8.0 and newer: mma.sync, cp.async; 4 warps of 16 query rows per CTA.
//
//   barrier A | issue V(j+1) | resolve j+2 | S = Q K(j) | mask, softmax | publish j+2
//   barrier B | issue K(j+2) | mask bits of j+2         | O += P V(j)
//
// K and V have two buffers each. Barrier A: K(j) has landed and all warps are done with V(j-1). Barrier B: V(j) has
// landed, all are done with K(j), and the addresses of stage j+2 are published (forward_sm80_keys.h).
// Q and P stay in registers; slots without a key are zero-filled, so that values of unread keys are never multiplied.
#pragma once
#include "kernels/attention/combine.h"
#include "kernels/attention/forward_sm80_keys.h"

namespace vdit::gpu::sm80 {

constexpr int kRows = 64, kThreads = 128;
constexpr float kLog2e = 1.44269504088896340736f;

struct KernelParams {
  ForwardArgs args;
  float scale_log2;  // |scale| * log2(e), never 0: then the largest score belongs to the largest product
  uint32_t q_sign;   // xor of two query elements: the sign of scale
};

// Tiles in shared memory: rows of kDim elements as 16-byte chunks, swizzled so that the 8 rows that one ldmatrix phase
// reads lie in different banks. Columns from params.dim on are zero.
template <int kDim>
struct Config {
  static constexpr int kKeys = kDim > 128 ? 32 : 64;
  static constexpr int kChunks = kDim / 8;
  static constexpr uint32_t kTile = kKeys * kDim * 2;
  static constexpr bool kKeepQ = kDim <= 128;  // in registers; else read again from shared memory for every stage
  static constexpr uint32_t kQ = kKeepQ ? 2 * kTile : 4 * kTile;  // K0 V0 K1 V1, Q until K1 is loaded or behind them
  static constexpr uint32_t kInfo = kKeepQ ? 4 * kTile : 4 * kTile + kRows * kDim * 2;
  static constexpr uint32_t kRowIds = kInfo + StageInfo<kKeys>::kBytes;
  static constexpr uint32_t kSums = kRowIds + kRows * 4;
  static constexpr uint32_t kBytes = kSums + 16;
  static constexpr int kMinBlocks = kDim > 64 ? 2 : 3;
};

template <int kChunks>
VD_DEV uint32_t chunk_offset(int row, int chunk) {
  return (row * kChunks + (chunk ^ (kChunks % 8 == 0 ? row & 7 : row >> 1 & 3))) * 16;
}

VD_DEV const char* pointer_of(uint2 v) {
  return reinterpret_cast<const char*>(static_cast<uintptr_t>(v.x | uint64_t(v.y) << 32));
}

// Piece n of a tile that this thread copies: chunk `chunk` of row `row`, at `offset`.
template <int kChunks>
struct Copy {
  int row, chunk;
  uint32_t offset;
  VD_METHOD explicit Copy(int n) {
    constexpr int kStep = kThreads / kChunks;
    if constexpr (kThreads % (8 * kChunks) == 0) {  // the swizzle does not change from piece to piece
      row = threadIdx.x / kChunks + n * kStep;
      chunk = threadIdx.x % kChunks;
      offset = chunk_offset<kChunks>(threadIdx.x / kChunks, chunk) + n * kStep * kChunks * 16;
    } else {
      row = (threadIdx.x + n * kThreads) / kChunks;
      chunk = (threadIdx.x + n * kThreads) % kChunks;
      offset = chunk_offset<kChunks>(row, chunk);
    }
  }
};

// Rows by address, 16 bytes per thread and step.
template <int kDim, int kKeys>
VD_DEV void load_keys(const AttentionParams& p, uint32_t tile, uint32_t pointers) {
  constexpr int kChunks = kDim / 8;
  VD_UNROLL for (int n = 0; n < kKeys * kChunks / kThreads; ++n) {
    const Copy<kChunks> c(n);
    const char* from = pointer_of(arch::lds64(pointers + c.row * 8));
    const bool inside = from != nullptr && c.chunk * 8 < p.dim;
    arch::cp_async16(tile + c.offset, inside ? from + c.chunk * 16 : p.q.data, inside);
  }
}

template <int kDim>
VD_DEV void load_queries(const AttentionParams& p, const Item& item, uint32_t tile, uint32_t row_ids) {
  constexpr int kChunks = kDim / 8;
  VD_UNROLL for (int n = 0; n < kRows * kChunks / kThreads; ++n) {
    const Copy<kChunks> c(n);
    const int32_t original = int32_t(arch::lds32(row_ids + c.row * 4));
    const bool inside = original >= 0 && c.chunk * 8 < p.dim;
    const char* from = row_pointer(p.q, item.batch, item.head, inside ? original : 0, 2);
    arch::cp_async16(tile + c.offset, inside ? from + c.chunk * 16 : p.q.data, inside);
  }
}

// A warp's accumulators: fragment n holds columns 8n + 2 (lane % 4) + {0, 1} of rows lane / 4 ([0], [1]) and
// lane / 4 + 8 ([2], [3]).
template <int kTiles>
using Fragments = float[kTiles][4];

// Running maximum of score * scale_log2, and this thread's share of the sum, for its two rows.
struct Softmax {
  float top[2], sum[2];
};

// Slots that hold no key, and slots the row does not read, get -inf.
template <int kKeys>
VD_DEV void mask_scores(Fragments<kKeys / 8>& s, uint4 header, uint32_t bits) {
  const int lane = threadIdx.x % 32;
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    VD_UNROLL for (int word = 0; word < kKeys / 32; ++word) {
      const uint32_t valid = word == 0 ? header.x : header.y;
      const uint32_t row_bits = arch::shfl(bits, lane / 4 + 8 * r + 16 * word);
      const uint32_t readable = (header.z != 0 ? valid & row_bits : valid) >> (2 * (lane % 4));
      VD_UNROLL for (int n = 0; n < 4; ++n) {
        float (&f)[4] = s[4 * word + n];
        if ((readable >> (8 * n) & 1u) == 0) f[2 * r] = -INFINITY;
        if ((readable >> (8 * n + 1) & 1u) == 0) f[2 * r + 1] = -INFINITY;
      }
    }
  }
}

// Scores to weights relative to the running maximum; rescales what was accumulated before.
template <int kKeys, int kOut>
VD_DEV void softmax_step(Fragments<kKeys / 8>& s, Fragments<kOut>& o, Softmax& f, float scale_log2) {
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    float top = -INFINITY;
    VD_UNROLL for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = fmaxf(top, arch::shfl_xor_f(top, 1));
    top = fmaxf(top, arch::shfl_xor_f(top, 2));
    top = fmaxf(f.top[r], top * scale_log2);
    const float base = top == -INFINITY ? 0.f : top;  // nothing read yet: all weights are 0
    const float shrink = arch::ex2(f.top[r] - base);
    f.top[r] = top;
    float sum = 0.f;
    VD_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
      VD_UNROLL for (int c = 2 * r; c < 2 * r + 2; ++c) {
        s[n][c] = arch::ex2(fmaf(s[n][c], scale_log2, -base));
        sum += s[n][c];
      }
    }
    f.sum[r] = f.sum[r] * shrink + sum;
    VD_UNROLL for (int n = 0; n < kOut; ++n) {
      o[n][2 * r] *= shrink;
      o[n][2 * r + 1] *= shrink;
    }
  }
}

// Normalised rows to `out` through shared memory (16-byte stores), or to the partial results in fp32.
template <class T, int kDim>
VD_DEV void store(const ForwardArgs& a, const Item& item, int64_t part, uint32_t tile, uint32_t row_ids,
                  Fragments<kDim / 8>& o, const Softmax& f) {
  const AttentionParams& p = a.params;
  constexpr int kChunks = kDim / 8;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16, column = 2 * (lane % 4);
  const bool split = a.work.splits > 1;
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    float sum = f.sum[r];
    sum += arch::shfl_xor_f(sum, 1);
    sum += arch::shfl_xor_f(sum, 2);
    const int row = warp_row + lane / 4 + 8 * r;
    const int32_t original = int32_t(arch::lds32(row_ids + row * 4));
    const bool empty = sum == 0.f;
    const float log2_sum = empty ? -INFINITY : f.top[r] + log2f(sum);
    float scale = empty ? 0.f : 1.f / sum;
    if (split) {
      const int64_t at = part * a.work.rows + row;
      if (original >= 0 && lane % 4 == 0) a.work.part_lse[at] = log2_sum;
      if (original >= 0 && !empty) {
        VD_UNROLL for (int n = 0; n < kChunks; ++n) {
          if (8 * n >= p.dim) continue;
          float* to = a.work.part_out + at * p.dim + 8 * n + column;
          to[0] = o[n][2 * r] * scale;
          to[1] = o[n][2 * r + 1] * scale;
        }
      }
      continue;
    }
    const int64_t lse_at = (int64_t(item.batch) * p.heads + item.head) * p.lq + original;
    if (original >= 0 && lane % 4 == 0) a.outputs.lse[lse_at] = log2_sum * kLn2;
    if (original >= 0 && !empty && p.row_scale != nullptr) scale *= p.row_scale[lse_at];
    VD_UNROLL for (int n = 0; n < kChunks; ++n) {
      const uint32_t pair = empty ? 0u : arch::pack<T>(o[n][2 * r] * scale, o[n][2 * r + 1] * scale);
      arch::sts32(tile + chunk_offset<kChunks>(row, n) + column * 2, pair);
    }
  }
  if (split) return;
  arch::syncwarp();  // a warp stores its own 16 rows
  VD_UNROLL for (int n = 0; n < 16 * kChunks / 32; ++n) {
    const int i = lane + 32 * n, row = warp_row + i / kChunks, chunk = i % kChunks;
    const int32_t original = int32_t(arch::lds32(row_ids + row * 4));
    if (original < 0 || chunk * 8 >= p.dim) continue;
    char* to = static_cast<char*>(a.outputs.out) +
               (((int64_t(item.batch) * p.lq + original) * p.heads + item.head) * p.dim + chunk * 8) * 2;
    arch::stg128(to, arch::lds128(tile + chunk_offset<kChunks>(row, chunk)));
  }
}

template <class T, int kDim>
VD_KERNEL(kThreads, Config<kDim>::kMinBlocks)
forward(const VD_GRID_CONST KernelParams kp) {
  using C = Config<kDim>;
  constexpr int kKeys = C::kKeys, kChunks = C::kChunks, kSteps = kDim / 16;
  const AttentionParams& p = kp.args.params;
  const Work& work = kp.args.work;
  const int split = blockIdx.x % work.splits;
  const Item item = locate(p, work, blockIdx.x / work.splits);
  if (item.rows <= 0) return;

  VD_DYN_SMEM(raw);
  const uint32_t smem = arch::smem_u32(raw), row_ids = smem + C::kRowIds;
  const StageInfo<kKeys> info{smem + C::kInfo};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  if (threadIdx.x < kRows) {
    const int32_t* q_order = order_row(p.plan.q_order, item.batch, item.head, p.lq);
    int32_t original = -1;
    if (int(threadIdx.x) < item.rows) original = item.start + threadIdx.x;
    if (original >= 0 && q_order != nullptr) original = q_order[original];
    if (original >= p.lq) original = -1;
    arch::sts32(row_ids + threadIdx.x * 4, uint32_t(original));
  }
  const KeyList list = list_keys<kThreads>(p, item, smem + C::kSums);
  const int stages = (list.total + kKeys - 1) / kKeys;
  const int first = int(int64_t(stages) * split / work.splits), last = int(int64_t(stages) * (split + 1) / work.splits);
  auto k_tile = [&](int j) { return smem + ((j - first) & 1) * 2 * C::kTile; };
  auto v_tile = [&](int j) { return k_tile(j) + C::kTile; };
  auto load_q = [&](int k, uint32_t (&q)[4]) {
    arch::ldsm4(smem + C::kQ + chunk_offset<kChunks>(warp * 16 + lane % 16, 2 * k + lane / 16), q);
    VD_UNROLL for (int i = 0; i < 4; ++i) q[i] ^= kp.q_sign;
  };

  float o[kDim / 8][4];
  VD_UNROLL for (int n = 0; n < kDim / 8; ++n) VD_UNROLL for (int c = 0; c < 4; ++c) o[n][c] = 0.f;
  Softmax f{{-INFINITY, -INFINITY}, {0.f, 0.f}};

  if (first < last) {
    const int32_t* kv_order = order_row(p.plan.kv_order, item.batch, item.head, p.lk);
    load_queries<kDim>(p, item, smem + C::kQ, row_ids);
    arch::cp_async_commit();
    RunWindow window{};
    int32_t original[kKeys / 32];
    int pieces = 0;
    if (warp == 0) {
      if (item.tile < 0) {
        window.load_dense(list);
      } else {
        window.next = list.run;
        window.load(p, list);
      }
      for (int j = first; j < first + 2; ++j) {
        pieces = resolve<kKeys>(p, list, window, j, info.pieces(j), original);
        VD_UNROLL for (int i = 0; i < kKeys / 32; ++i) original[i] = original_key(p, kv_order, original[i]);
        publish<kKeys>(p, item, list, j, pieces, original, info);
      }
    }
    arch::syncthreads();
    load_keys<kDim, kKeys>(p, k_tile(first), info.k_pointers(first));
    arch::cp_async_commit();
    load_keys<kDim, kKeys>(p, v_tile(first), info.v_pointers(first));
    arch::cp_async_commit();
    arch::cp_async_wait<2>();
    arch::syncthreads();
    uint32_t q[C::kKeepQ ? kSteps : 1][4];
    if constexpr (C::kKeepQ) {
      VD_UNROLL for (int k = 0; k < kSteps; ++k) load_q(k, q[k]);
      arch::syncthreads();
    }
    load_keys<kDim, kKeys>(p, k_tile(first + 1), info.k_pointers(first + 1));
    arch::cp_async_commit();

    // Mask bits of stages j and j + 1: lane l keeps those of row l % 16 and slots from 32 (l / 16) on.
    const int64_t mask_row = item.first + warp * 16 + lane % 16;
    const bool keeps_bits = lane / 16 < kKeys / 32 && warp * 16 + lane % 16 < item.rows;
    auto bits_of = [&](int j) {
      const int count = int(arch::lds128(info.header(j)).z);
      return keeps_bits ? slot_bits(p.plan, info.pieces(j), count, mask_row, lane / 16) : 0u;
    };
    uint32_t bits = bits_of(first), next_bits = bits_of(first + 1);

    for (int j = first; j < last; ++j) {
      arch::cp_async_wait<2>();
      arch::syncthreads();
      if (j + 1 < last) load_keys<kDim, kKeys>(p, v_tile(j + 1), info.v_pointers(j + 1));
      arch::cp_async_commit();
      if (warp == 0 && j + 2 < last) {
        pieces = resolve<kKeys>(p, list, window, j + 2, info.pieces(j + 2), original);
        VD_UNROLL for (int i = 0; i < kKeys / 32; ++i) original[i] = original_key(p, kv_order, original[i]);
      }

      float s[kKeys / 8][4];
      VD_UNROLL for (int n = 0; n < kKeys / 8; ++n) VD_UNROLL for (int c = 0; c < 4; ++c) s[n][c] = 0.f;
      VD_UNROLL for (int k = 0; k < kSteps; ++k) {
        if constexpr (!C::kKeepQ) load_q(k, q[0]);
        VD_UNROLL for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t b[4];
          const int row = n * 16 + lane % 8 + lane / 16 * 8;
          arch::ldsm4(k_tile(j) + chunk_offset<kChunks>(row, 2 * k + lane / 8 % 2), b);
          arch::mma<T>(s[2 * n], q[C::kKeepQ ? k : 0], b[0], b[1]);
          arch::mma<T>(s[2 * n + 1], q[C::kKeepQ ? k : 0], b[2], b[3]);
        }
      }
      const uint4 header = arch::lds128(info.header(j));
      if ((header.x & header.y) != ~0u || header.z != 0) mask_scores<kKeys>(s, header, bits);
      softmax_step<kKeys, kDim / 8>(s, o, f, kp.scale_log2);
      if (warp == 0 && j + 2 < last) publish<kKeys>(p, item, list, j + 2, pieces, original, info);

      arch::cp_async_wait<2>();
      arch::syncthreads();
      if (j + 2 < last) load_keys<kDim, kKeys>(p, k_tile(j), info.k_pointers(j + 2));
      arch::cp_async_commit();
      bits = next_bits;
      if (j + 2 < last) next_bits = bits_of(j + 2);
      VD_UNROLL for (int k = 0; k < kKeys / 16; ++k) {
        const uint32_t a[4] = {arch::pack<T>(s[2 * k][0], s[2 * k][1]), arch::pack<T>(s[2 * k][2], s[2 * k][3]),
                               arch::pack<T>(s[2 * k + 1][0], s[2 * k + 1][1]),
                               arch::pack<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
        VD_UNROLL for (int n = 0; n < kDim / 16; ++n) {
          uint32_t b[4];
          arch::ldsm4t(v_tile(j) + chunk_offset<kChunks>(k * 16 + lane % 16, 2 * n + lane / 16), b);
          arch::mma<T>(o[2 * n], a, b[0], b[1]);
          arch::mma<T>(o[2 * n + 1], a, b[2], b[3]);
        }
      }
    }
    arch::cp_async_wait<0>();
    arch::syncthreads();  // the tiles are free
  }
  store<T, kDim>(kp.args, item, blockIdx.x, smem, row_ids, o, f);
}

template <class T, int kDim>
int launch_forward(const ForwardArgs& args, void* stream) {
  KernelParams kp{};
  kp.args = args;
  const float scale = args.params.scale;
  kp.scale_log2 = scale == 0.f ? 1e-30f : fabsf(scale) * kLog2e;  // products times 1e-30 are as good as 0
  kp.q_sign = scale < 0.f ? 0x80008000u : 0u;
  const int64_t blocks = int64_t(args.work.capacity) * args.work.replicas * args.work.splits;
  return arch::launch(forward<T, kDim>, dim3(unsigned(blocks)), dim3(kThreads), Config<kDim>::kBytes,
                      static_cast<arch::stream_t>(stream), kp);
}

}  // namespace vdit::gpu::sm80

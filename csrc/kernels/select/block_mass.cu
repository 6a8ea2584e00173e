// Scores by mma.sync, fed by cp.async, reduced in registers; compute capability 8.0 and newer.
//
// A CTA has 128 folded query rows, 32 for each of 4 warps, and reads all keys, 64 at a time. The contraction runs over
// chunks of 64 columns: those of the first row slice, then those of the second, ...
//
//   wait for chunk t | barrier | issue chunk t+2 | S += Q K(t) | after the last chunk of 64 keys: reduce S
//
// Chunks have three buffers: t+2 goes where t-1 was, which all warps have left at the barrier. Up to 256 columns of
// queries stay in shared memory; more are copied again with every chunk of keys.
#include "kernels/select/block_mass.h"

#include "kernels/attention/backward_tile.h"
#include "kernels/attention/problem.h"

namespace vdit::gpu::search {

using backward::clear;
using sm80::chunk_offset;
using sm80::Copy;
using sm80::Fragments;
using sm80::kLog2e;
using sm80::kThreads;

constexpr int kRows = 128, kKeys = 64, kDepth = 64, kBuffers = 3;
constexpr int kChunks = kDepth / 8;  // 16-byte pieces of a row
constexpr uint32_t kQueryBytes = kRows * kDepth * 2, kKeyBytes = kKeys * kDepth * 2;
constexpr int kResidentChunks = 4;
constexpr int kSlots = 16;  // key blocks whose sums wait in shared memory
constexpr uint32_t kSumBytes = kSlots * kRows * 4;
constexpr uint32_t kSharedBytes = 101'376;  // what compute capability 8.6 and 8.9 give a CTA: the least of all targets
static_assert(kResidentChunks * kQueryBytes + kBuffers * kKeyBytes + kSumBytes <= kSharedBytes);
static_assert(kBuffers * (kQueryBytes + kKeyBytes) + kSumBytes <= kSharedBytes);
constexpr float kLargest = 3.40282347e38f;

struct Args {
  ScoreParams p;
  int32_t queries, pieces;   // folded rows; chunks of a row slice
  float scale_log2;          // |scale| * log2(e), never 0
  uint32_t q_sign;           // xor of two query elements: the sign of scale
  int32_t tile_rows, tiles;  // query rows of a CTA: at most kRows, or one block of more
  const float* lse;
  float* out;
  int32_t q_block, kv_block, q_blocks, kv_blocks;
};

// Where the chunks of the contraction lie: of `pieces` per slice the one at column 64 * piece.
struct Chunk {
  int32_t stage, slice, piece;
  VD_METHOD void advance(const Args& a) {
    if (++piece < a.pieces) return;
    piece = 0;
    if (++slice < a.p.fold) return;
    slice = 0;
    ++stage;
  }
};

// One CTA's head, and the rows of the pass at hand.
struct Place {
  int32_t batch, head, queries, keys;  // rows of q and k that exist
  int32_t row, end;                    // folded queries
};

VD_DEV int32_t valid_rows(const Lengths& lengths, int32_t batch, int32_t most) {
  if (lengths.of == nullptr) return most;
  const int64_t n = lengths.bytes == 8 ? static_cast<const int64_t*>(lengths.of)[batch]
                                       : static_cast<const int32_t*>(lengths.of)[batch];
  return n < 0 ? 0 : n < most ? int32_t(n) : most;
}

VD_DEV void copy_piece(const ScoreParams& p, uint32_t to, const char* from, int column, bool exists) {
  const bool inside = exists && column < p.dim;
  arch::cp_async16(to, inside ? from + column * 2 : p.q.data, inside);
}

VD_DEV void load_keys(const Args& a, const Place& at, const Chunk& chunk, uint32_t tile) {
  const ScoreParams& p = a.p;
  const int32_t head = at.head / (p.heads / p.kv_heads);
  VD_UNROLL for (int n = 0; n < kKeys * kChunks / kThreads; ++n) {
    const Copy<kChunks> c(n);
    const int32_t row = (chunk.stage * kKeys + c.row) * p.fold + chunk.slice;
    const char* from = row_pointer(p.k, at.batch, head, row, 2);
    copy_piece(p, tile + c.offset, from, chunk.piece * kDepth + c.chunk * 8, row < at.keys);
  }
}

VD_DEV void load_queries(const Args& a, const Place& at, const Chunk& chunk, uint32_t tile) {
  const ScoreParams& p = a.p;
  VD_UNROLL for (int n = 0; n < kRows * kChunks / kThreads; ++n) {
    const Copy<kChunks> c(n);
    const int32_t folded = at.row + c.row, row = folded * p.fold + p.fold - 1 - chunk.slice;
    const char* from = row_pointer(p.q, at.batch, at.head, row, 2);
    copy_piece(p, tile + c.offset, from, chunk.piece * kDepth + c.chunk * 8, folded < at.end && row < at.queries);
  }
}

// s[m] += this warp's rows 16m ... 16m + 15 of the queries, times the keys, over one chunk.
template <class T>
VD_DEV void multiply(Fragments<kKeys / 8> (&s)[2], uint32_t queries, uint32_t keys, int columns, uint32_t sign) {
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 32;
  VD_UNROLL for (int k = 0; k < kDepth / 16; ++k) {
    if (k * 16 >= columns) break;
    uint32_t q[2][4];
    VD_UNROLL for (int m = 0; m < 2; ++m) {
      arch::ldsm4(queries + chunk_offset<kChunks>(warp_row + m * 16 + lane % 16, 2 * k + lane / 16), q[m]);
      VD_UNROLL for (int i = 0; i < 4; ++i) q[m][i] ^= sign;
    }
    VD_UNROLL for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t b[4];
      const int row = n * 16 + lane % 8 + lane / 16 * 8;
      arch::ldsm4(keys + chunk_offset<kChunks>(row, 2 * k + lane / 8 % 2), b);
      VD_UNROLL for (int m = 0; m < 2; ++m) {
        arch::mma<T>(s[m][2 * n], q[m], b[0], b[1]);
        arch::mma<T>(s[m][2 * n + 1], q[m], b[2], b[3]);
      }
    }
  }
}

// A thread's rows of a pass are numbered 2m + r: row 16m + 8r + lane / 4 of its warp.
VD_DEV int row_of(int i) { return threadIdx.x / 32 * 32 + i * 8 + threadIdx.x % 32 / 4; }

// Log-sum-exp per row, in base 2. A maximum of +inf becomes the largest number, so that no difference is inf - inf: a
// score of +inf then weighs +inf, and only NaN makes NaN.
struct LogSumExp {
  float top[4], sum[4];

  VD_METHOD void begin(const Args&, const Place&, int32_t, uint32_t) {
    VD_UNROLL for (int i = 0; i < 4; ++i) {
      top[i] = -INFINITY;
      sum[i] = 0.f;
    }
  }
  VD_METHOD void stage(const Args& a, const Place&, int32_t keys, int32_t first, Fragments<kKeys / 8> (&s)[2]) {
    const int32_t valid = keys - first, column = 2 * (threadIdx.x % 4);
    VD_UNROLL for (int i = 0; i < 4; ++i) {
      Fragments<kKeys / 8>& f = s[i / 2];
      const int c = 2 * (i % 2);
      float most = -INFINITY;
      VD_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
        if (valid < kKeys && 8 * n + column >= valid) f[n][c] = -INFINITY;
        if (valid < kKeys && 8 * n + column + 1 >= valid) f[n][c + 1] = -INFINITY;
        most = fmaxf(most, fmaxf(f[n][c], f[n][c + 1]));
      }
      most = fmaxf(most, arch::shfl_xor_f(most, 1));
      most = fmaxf(most, arch::shfl_xor_f(most, 2));
      most = fminf(fmaxf(top[i], most * a.scale_log2), kLargest);
      const float base = most == -INFINITY ? 0.f : most;  // nothing read yet: all weights are 0
      float part = 0.f;
      VD_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
        part += arch::ex2(fmaf(f[n][c], a.scale_log2, -base));
        part += arch::ex2(fmaf(f[n][c + 1], a.scale_log2, -base));
      }
      sum[i] = sum[i] * arch::ex2(top[i] - base) + part;
      top[i] = most;
    }
  }
  VD_METHOD void end(const Args& a, const Place& at) {
    VD_UNROLL for (int i = 0; i < 4; ++i) {
      float total = sum[i];
      total += arch::shfl_xor_f(total, 1);
      total += arch::shfl_xor_f(total, 2);
      const int32_t row = at.row + row_of(i);
      if (row >= at.end || threadIdx.x % 4 != 0) continue;
      const int64_t to = (int64_t(at.batch) * a.p.heads + at.head) * a.queries + row;
      a.out[to] = total == 0.f || row * a.p.fold >= at.queries ? -INFINITY : (top[i] + log2f(total)) * kLn2;
    }
  }
};

// Sums of weights over blocks. Rows of a key block are added in registers; when it ends, per unit of 8 rows (or of one,
// where blocks of queries do not begin at multiples of 8) in shared memory, from where blocks of queries are written.
struct Mass {
  float lse2[4], sum[4];
  bool dead[4];           // rows that do not exist or have weight 0
  uint32_t sums;          // [kSlots][units]
  int32_t block, border;  // the key block at hand, and where it ends
  int32_t slots;          // key blocks before it that wait
  bool first_pass;

  VD_METHOD void begin(const Args& a, const Place& at, int32_t pass, uint32_t shared) {
    sums = shared;
    first_pass = pass == 0;
    block = slots = 0;
    border = a.kv_block;
    const float* lse = a.lse + (int64_t(at.batch) * a.p.heads + at.head) * a.queries;
    VD_UNROLL for (int i = 0; i < 4; ++i) {
      const int32_t row = at.row + row_of(i);
      const float x = row < at.end ? lse[row] : -INFINITY;
      dead[i] = x == -INFINITY;
      lse2[i] = dead[i] ? 0.f : x * kLog2e;
      sum[i] = 0.f;
    }
  }

  VD_METHOD void stage(const Args& a, const Place& at, int32_t keys, int32_t first, Fragments<kKeys / 8> (&s)[2]) {
    VD_UNROLL for (int m = 0; m < 2; ++m) {
      VD_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
        VD_UNROLL for (int c = 0; c < 4; ++c) {
          float& x = s[m][n][c];
          x = arch::ex2(fmaf(x, a.scale_log2, -lse2[2 * m + c / 2]));
        }
      }
    }
    const int32_t last = keys - first < kKeys ? keys : first + kKeys;
    for (int32_t from = first; from < last;) {
      const int32_t to = border < last ? border : last;
      add(s, from - first, to - first);
      from = to;
      if (to == border || to == keys) finish_block(a, at, to == keys);
    }
  }

  // Columns [from, to) of the stage.
  VD_METHOD void add(const Fragments<kKeys / 8> (&s)[2], int from, int to) {
    const int column = 2 * (threadIdx.x % 4);
    float part[4] = {0.f, 0.f, 0.f, 0.f};
    if (to - from == kKeys) {
      VD_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
        VD_UNROLL for (int i = 0; i < 4; ++i) {
          const float* pair = &s[i / 2][n][2 * (i % 2)];
          part[i] += pair[0] + pair[1];
        }
      }
    } else {
      VD_UNROLL for (int n = 0; n < kKeys / 8; ++n) {
        VD_UNROLL for (int c = 0; c < 2; ++c) {
          const int at = 8 * n + column + c;
          if (at < from || at >= to) continue;
          VD_UNROLL for (int i = 0; i < 4; ++i) part[i] += s[i / 2][n][2 * (i % 2) + c];
        }
      }
    }
    VD_UNROLL for (int i = 0; i < 4; ++i) sum[i] += dead[i] ? 0.f : part[i];
  }

  VD_METHOD bool units_of_8(const Args& a) const { return a.q_block % 8 == 0; }

  // Adds over lanes, halving the number of values a lane holds: lane bits `high` and `low` say which of four.
  VD_METHOD float scatter_sums(int high, int low) const {
    const int lane = threadIdx.x % 32;
    const bool upper = (lane & high) != 0, odd = (lane & low) != 0;
    const float x = (upper ? sum[2] : sum[0]) + arch::shfl_xor_f(upper ? sum[0] : sum[2], high);
    const float y = (upper ? sum[3] : sum[1]) + arch::shfl_xor_f(upper ? sum[1] : sum[3], high);
    return (odd ? y : x) + arch::shfl_xor_f(odd ? x : y, low);
  }

  VD_METHOD void finish_block(const Args& a, const Place& at, bool last) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (units_of_8(a)) {
      float x = scatter_sums(16, 8);
      VD_UNROLL for (int step = 4; step > 0; step /= 2) x += arch::shfl_xor_f(x, step);
      if (lane % 8 == 0) arch::sts32(sums + (slots * kRows / 8 + warp * 4 + lane / 8) * 4, arch::as_uint(x));
    } else {
      const float x = scatter_sums(2, 1);
      arch::sts32(sums + (slots * kRows + row_of(lane % 4)) * 4, arch::as_uint(x));
    }
    VD_UNROLL for (int i = 0; i < 4; ++i) sum[i] = 0.f;
    ++slots;
    ++block;
    border += a.kv_block;
    if (slots == kSlots || last) write_slots(a, at);
  }

  // The waiting sums to their blocks of queries; a block of several passes is read and written by the same threads.
  VD_METHOD void write_slots(const Args& a, const Place& at) {
    arch::syncthreads();
    const int unit = units_of_8(a) ? 8 : 1, units = kRows / unit;
    const int wanted = a.q_block / unit, per_block = wanted < units ? wanted : units;
    const int blocks = (at.end - at.row + a.q_block - 1) / a.q_block;
    for (int i = threadIdx.x; i < blocks * slots; i += kThreads) {
      const int g = i / slots, slot = i % slots;
      float total = 0.f;
      for (int u = g * per_block; u < (g + 1) * per_block; ++u)
        total += arch::as_float(arch::lds32(sums + (slot * units + u) * 4));
      float* to = row_of_blocks(a, at, g) + block - slots + slot;
      *to = first_pass ? total : *to + total;
    }
    slots = 0;
    arch::syncthreads();
  }

  VD_METHOD float* row_of_blocks(const Args& a, const Place& at, int g) const {
    return a.out + ((int64_t(at.batch) * a.p.heads + at.head) * a.q_blocks + at.row / a.q_block + g) * a.kv_blocks;
  }

  // Key blocks beyond the valid keys.
  VD_METHOD void end(const Args& a, const Place& at) {
    if (!first_pass) return;
    const int blocks = (at.end - at.row + a.q_block - 1) / a.q_block;
    for (int g = 0; g < blocks; ++g) {
      for (int32_t b = block + int32_t(threadIdx.x); b < a.kv_blocks; b += kThreads) row_of_blocks(a, at, g)[b] = 0.f;
    }
  }
};

template <bool kResident>
VD_DEV uint32_t ring_bytes() {
  return kResident ? kKeyBytes : kKeyBytes + kQueryBytes;
}

template <class T, class Reduce, bool kResident>
VD_KERNEL(kThreads, kResident ? 3 : 2)
search(const VD_GRID_CONST Args a) {
  const ScoreParams& p = a.p;
  VD_DYN_SMEM(raw);
  const uint32_t smem = arch::smem_u32(raw);
  const int32_t chunks = p.fold * a.pieces;  // of the contraction
  const uint32_t ring = smem + (kResident ? chunks * kQueryBytes : 0), sums = ring + kBuffers * ring_bytes<kResident>();
  const int32_t bh = int32_t(blockIdx.x / a.tiles), tile = int32_t(blockIdx.x % a.tiles);
  Place at{bh / p.heads, bh % p.heads, 0, 0, 0, 0};
  at.queries = valid_rows(p.q_len, at.batch, p.lq);
  at.keys = valid_rows(p.kv_len, at.batch, p.lk);
  const int32_t keys = (at.keys + p.fold - 1) / p.fold, stages = (keys + kKeys - 1) / kKeys;
  const int32_t begin = tile * a.tile_rows;
  const int32_t end = a.queries - begin < a.tile_rows ? a.queries : begin + a.tile_rows;

  Reduce reduce;
  for (int32_t pass = 0; begin + pass * kRows < end; ++pass) {
    at.row = begin + pass * kRows;
    at.end = end - at.row < kRows ? end : at.row + kRows;
    reduce.begin(a, at, pass, sums);

    Chunk next{0, 0, 0};
    uint32_t to = ring;
    auto load_next = [&] {
      if (next.stage < stages) {
        load_keys(a, at, next, to);
        if constexpr (!kResident) load_queries(a, at, next, to + kKeyBytes);
      }
      arch::cp_async_commit();
      next.advance(a);
      to = to == ring + (kBuffers - 1) * ring_bytes<kResident>() ? ring : to + ring_bytes<kResident>();
    };
    if constexpr (kResident) {
      if (stages > 0) {
        Chunk c{0, 0, 0};
        for (int32_t i = 0; i < chunks; ++i, c.advance(a)) load_queries(a, at, c, smem + i * kQueryBytes);
      }
    }
    VD_UNROLL for (int i = 0; i < kBuffers - 1; ++i) load_next();

    uint32_t from = ring;
    for (int32_t j = 0; j < stages; ++j) {
      float s[2][kKeys / 8][4];
      VD_UNROLL for (int m = 0; m < 2; ++m) clear<kKeys / 8>(s[m]);
      int32_t piece = 0;
      for (int32_t c = 0; c < chunks; ++c) {
        arch::cp_async_wait<kBuffers - 2>();
        arch::syncthreads();
        load_next();
        multiply<T>(s, kResident ? smem + c * kQueryBytes : from + kKeyBytes, from, p.dim - piece * kDepth, a.q_sign);
        piece = piece + 1 < a.pieces ? piece + 1 : 0;
        from = from == ring + (kBuffers - 1) * ring_bytes<kResident>() ? ring : from + ring_bytes<kResident>();
      }
      reduce.stage(a, at, keys, j * kKeys, s);
    }
    reduce.end(a, at);  // all copies have landed, and the last write_slots ended with a barrier: the buffers are free
  }
}

template <class T, class Reduce>
int launch(Args& a, void* stream) {
  const ScoreParams& p = a.p;
  const float scale = p.scale;
  a.pieces = int32_t(ceil_div(p.dim, kDepth));
  a.scale_log2 = scale == 0.f ? 1e-30f : fabsf(scale) * kLog2e;  // products times 1e-30 are as good as 0
  a.q_sign = scale < 0.f ? 0x80008000u : 0u;
  a.tiles = int32_t(ceil_div(a.queries, a.tile_rows));
  const int64_t blocks = int64_t(p.batch) * p.heads * a.tiles, chunks = int64_t(p.fold) * a.pieces;
  if (blocks > INT32_MAX) return kInvalid;
  const bool resident = chunks <= kResidentChunks;
  const size_t bytes =
      (resident ? size_t(chunks) * kQueryBytes + kBuffers * kKeyBytes : kBuffers * size_t(kKeyBytes + kQueryBytes)) +
      kSumBytes;
  return arch::launch(resident ? search<T, Reduce, true> : search<T, Reduce, false>, dim3(unsigned(blocks)),
                      dim3(kThreads), bytes, static_cast<arch::stream_t>(stream), a);
}

bool valid(const ScoreParams& p) {
  return p.dim >= 8 && p.dim <= 256 && p.dim % 8 == 0 && p.dtype != DType::f32 && p.kv_heads >= 1 &&
         p.heads % p.kv_heads == 0 && p.fold >= 1 && p.lq <= INT32_MAX / 4 && p.lk <= INT32_MAX / 4 &&
         rows_aligned(p.q, p.batch, p.lq, p.heads) && rows_aligned(p.k, p.batch, p.lk, p.kv_heads);
}

}  // namespace vdit::gpu::search

namespace vdit::gpu {

int score_lse(const ScoreParams& params, float* lse, void* stream) {
  if (params.batch == 0 || params.heads == 0 || params.lq == 0) return 0;
  if (!search::valid(params)) return kInvalid;
  search::Args a{};
  a.p = params;
  a.queries = int32_t(ceil_div(params.lq, params.fold));
  a.tile_rows = search::kRows;
  a.out = lse;
  return params.dtype == DType::bf16 ? search::launch<arch::BF16, search::LogSumExp>(a, stream)
                                     : search::launch<arch::F16, search::LogSumExp>(a, stream);
}

int block_mass(const ScoreParams& params, const float* lse, int64_t q_block, int64_t kv_block, float* mass,
               void* stream) {
  if (params.batch == 0 || params.heads == 0 || params.lq == 0 || params.lk == 0) return 0;
  if (!search::valid(params) || q_block < 1 || kv_block < 1) return kInvalid;
  search::Args a{};
  a.p = params;
  a.queries = int32_t(ceil_div(params.lq, params.fold));
  const int64_t keys = ceil_div(params.lk, params.fold);
  a.q_block = int32_t(q_block < a.queries ? q_block : a.queries);
  a.kv_block = int32_t(kv_block < keys ? kv_block : keys);
  a.q_blocks = int32_t(ceil_div(a.queries, a.q_block));
  a.kv_blocks = int32_t(ceil_div(keys, a.kv_block));
  a.tile_rows = a.q_block > search::kRows ? a.q_block : search::kRows / a.q_block * a.q_block;  // whole blocks
  a.lse = lse;
  a.out = mass;
  return params.dtype == DType::bf16 ? search::launch<arch::BF16, search::Mass>(a, stream)
                                     : search::launch<arch::F16, search::Mass>(a, stream);
}

int softmax_mass(const ScoreParams& params, int64_t q_block, int64_t kv_block, float* lse, float* mass, void* stream) {
  const int code = score_lse(params, lse, stream);
  return code != 0 ? code : block_mass(params, lse, q_block, kv_block, mass, stream);
}

}  // namespace vdit::gpu

// What the short-attention kernels share: one warp owns one sequence, or 64 of its queries, and a slice of shared
// memory with its keys, its values and up to 32 of its queries. Nothing synchronises more than a warp.
#pragma once
#include "arch/arch.h"
#include "kernels/short/short_attention.h"

namespace vdit::gpu::short_attention {

constexpr int kRowsPerItem = 64, kRowsStaged = 32;
constexpr float kLog2e = 1.44269504088896340736f;

struct Args {
  ShortAttentionParams p;
  uint32_t items, row_blocks;  // work items: sequences times blocks of kRowsPerItem queries
  int32_t chunks;              // 16-byte pieces of a staged row, zeros behind the dim included
  int32_t aligned;             // rows are read and written 16 bytes at a time
  uint32_t pitch;              // bytes between staged rows: an odd number of chunks, so that 8 rows hit all banks
  uint32_t values, queries;    // where they lie in a slice; the keys come first
  uint32_t slice;              // bytes per warp
};

struct F32;

// How 16 bytes of a row become floats.
template <class T>
struct Chunk {
  static constexpr int kElements = 8, kBytes = 2;
  VD_STATIC_METHOD void read(uint32_t at, float (&x)[kElements]) {
    const uint4 v = arch::lds128(at);
    const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
    VD_UNROLL for (int e = 0; e < 4; ++e) arch::unpack<T>(pair[e], x[2 * e], x[2 * e + 1]);
  }
  VD_STATIC_METHOD uint4 round(const float (&x)[kElements]) {
    return uint4{arch::pack<T>(x[0], x[1]), arch::pack<T>(x[2], x[3]), arch::pack<T>(x[4], x[5]),
                 arch::pack<T>(x[6], x[7])};
  }
  VD_STATIC_METHOD void copy(uint32_t to, const char* from, bool inside) {
    arch::sts16(to, inside ? *reinterpret_cast<const uint16_t*>(from) : uint16_t(0));
  }
  VD_STATIC_METHOD void store(char* to, float x) { *reinterpret_cast<uint16_t*>(to) = uint16_t(arch::pack<T>(x, 0.f)); }
};
template <>
struct Chunk<F32> {
  static constexpr int kElements = 4, kBytes = 4;
  VD_STATIC_METHOD void read(uint32_t at, float (&x)[kElements]) {
    const uint4 v = arch::lds128(at);
    x[0] = arch::as_float(v.x), x[1] = arch::as_float(v.y), x[2] = arch::as_float(v.z), x[3] = arch::as_float(v.w);
  }
  VD_STATIC_METHOD uint4 round(const float (&x)[kElements]) {
    return uint4{arch::as_uint(x[0]), arch::as_uint(x[1]), arch::as_uint(x[2]), arch::as_uint(x[3])};
  }
  VD_STATIC_METHOD void copy(uint32_t to, const char* from, bool inside) {
    arch::sts32(to, inside ? *reinterpret_cast<const uint32_t*>(from) : 0u);
  }
  VD_STATIC_METHOD void store(char* to, float x) { *reinterpret_cast<float*>(to) = x; }
};

// The sequence and the queries of one work item.
struct Item {
  int64_t batch, place, head;
  int first, rows;  // queries
  int keys;         // that exist
};

VD_DEV Item item_at(const Args& a, uint32_t index) {
  const ShortAttentionParams& p = a.p;
  const uint32_t sequence = index / a.row_blocks, block = index % a.row_blocks;
  const uint32_t outer = sequence / uint32_t(p.heads), places = uint32_t(p.places);
  Item item{outer / places, outer % places, sequence % uint32_t(p.heads), int(block) * kRowsPerItem, 0, p.lk};
  item.rows = p.lq - item.first < kRowsPerItem ? p.lq - item.first : kRowsPerItem;
  if (p.kv_len != nullptr) {
    const int64_t entry = item.batch * p.kv_len_stride;
    const int64_t valid = p.kv_len_bytes == 8 ? static_cast<const int64_t*>(p.kv_len)[entry]
                                              : int64_t(static_cast<const int32_t*>(p.kv_len)[entry]);
    item.keys = valid < 0 ? 0 : valid < p.lk ? int(valid) : p.lk;
  }
  return item;
}

// How many keys query `row` reads.
VD_DEV int keys_of_row(const Args& a, const Item& item, int row) {
  if (a.p.causal == 0) return item.keys;
  const int end = row + 1 + a.p.lk - a.p.lq;
  return end < 0 ? 0 : end < item.keys ? end : item.keys;
}

VD_DEV int64_t row_offset(const ShortView& x, const Item& item, int64_t row) {  // in elements
  return item.batch * x.stride[0] + row * x.stride[1] + item.place * x.stride[2] + item.head * x.stride[3];
}

// Rows [first, first + valid) to shared memory, zeros up to `rows`; the copies end with the next cp_async_wait.
template <class T>
VD_DEV void stage(const Args& a, const Item& item, const ShortView& x, int first, int valid, int rows, uint32_t to) {
  using C = Chunk<T>;
  const int lane = threadIdx.x % 32;
  const char* from = static_cast<const char*>(x.data) + row_offset(x, item, first) * C::kBytes;
  const int64_t row_bytes = x.stride[1] * C::kBytes;
  if (a.aligned != 0) {
    const int row_step = 32 / a.chunks, chunk_step = 32 % a.chunks;
    int row = lane / a.chunks, chunk = lane % a.chunks;
    while (row < rows) {
      const bool inside = row < valid && chunk * C::kElements < a.p.dim;
      arch::cp_async16(to + row * a.pitch + chunk * 16, inside ? from + row * row_bytes + chunk * 16 : x.data, inside);
      row += row_step;
      chunk += chunk_step;
      if (chunk >= a.chunks) chunk -= a.chunks, ++row;
    }
  } else {
    const int columns = a.chunks * C::kElements;
    for (int row = 0; row < rows; ++row) {
      for (int d = lane; d < columns; d += 32) {
        const bool inside = row < valid && d < a.p.dim;
        C::copy(to + row * a.pitch + d * C::kBytes, from + (inside ? row * row_bytes + d * x.stride[4] * C::kBytes : 0),
                inside);
      }
    }
  }
}

// Plain multiply-add: queries [row, row + count) of the staged ones, whose first is query `first`. A lane holds the
// scores of keys `lane` and `lane + 32`, then the output chunks `lane` and so on; kAtOnce rows share what is read.
template <class T>
VD_DEV void plain_rows(const Args& a, const Item& item, uint32_t slice, int first, int count) {
  using C = Chunk<T>;
  constexpr int kAtOnce = 4, kE = C::kElements;
  const int lane = threadIdx.x % 32;
  const float scale = a.p.scale * kLog2e;
  for (int row = 0; row < count; row += kAtOnce) {
    int reads[kAtOnce];
    float p[kAtOnce][2] = {};
    uint32_t q = slice + a.queries + row * a.pitch;
    VD_UNROLL for (int r = 0; r < kAtOnce; ++r) reads[r] = row + r < count ? keys_of_row(a, item, first + row + r) : 0;
    VD_UNROLL for (int half = 0; half < 2; ++half) {
      if (32 * half >= item.keys) continue;
      const int key = 32 * half + lane < item.keys ? 32 * half + lane : item.keys - 1;
      for (int chunk = 0; chunk < a.chunks; ++chunk) {
        float k[kE];
        C::read(slice + key * a.pitch + chunk * 16, k);
        VD_UNROLL for (int r = 0; r < kAtOnce; ++r) {
          float x[kE];
          C::read(q + r * a.pitch + chunk * 16, x);
          VD_UNROLL for (int e = 0; e < kE; ++e) p[r][half] = fmaf(x[e], k[e], p[r][half]);
        }
      }
    }
    float factor[kAtOnce];
    VD_UNROLL for (int r = 0; r < kAtOnce; ++r) {
      VD_UNROLL for (int half = 0; half < 2; ++half) p[r][half] =
          32 * half + lane < reads[r] ? p[r][half] * scale : -INFINITY;
      float top = fmaxf(p[r][0], p[r][1]);
      VD_UNROLL for (int step = 16; step > 0; step /= 2) top = fmaxf(top, arch::shfl_xor_f(top, step));
      if (top == -INFINITY) top = 0.f;
      float sum = 0.f;
      VD_UNROLL for (int half = 0; half < 2; ++half) {
        p[r][half] = arch::ex2(p[r][half] - top);
        sum += p[r][half];
      }
      VD_UNROLL for (int step = 16; step > 0; step /= 2) sum += arch::shfl_xor_f(sum, step);
      factor[r] = sum == 0.f ? 0.f : 1.f / sum;
    }
    int most = 0;
    VD_UNROLL for (int r = 0; r < kAtOnce; ++r) most = reads[r] > most ? reads[r] : most;
    for (int base = 0; base < a.chunks; base += 32) {
      const int chunk = base + lane;
      const uint32_t column = slice + a.values + (chunk < a.chunks ? chunk : 0) * 16;
      float o[kAtOnce][kE] = {};
      for (int key = 0; key < most; ++key) {
        float v[kE];
        C::read(column + key * a.pitch, v);
        VD_UNROLL for (int r = 0; r < kAtOnce; ++r) {
          const float weight = arch::shfl_f(key < 32 ? p[r][0] : p[r][1], key % 32);
          if (key >= reads[r]) continue;  // 0 * NaN is NaN
          VD_UNROLL for (int e = 0; e < kE; ++e) o[r][e] = fmaf(weight, v[e], o[r][e]);
        }
      }
      VD_UNROLL for (int r = 0; r < kAtOnce; ++r) {
        if (row + r >= count || chunk * kE >= a.p.dim) continue;
        char* out = const_cast<char*>(static_cast<const char*>(a.p.out.data)) +
                    row_offset(a.p.out, item, first + row + r) * C::kBytes;
        VD_UNROLL for (int e = 0; e < kE; ++e) o[r][e] *= factor[r];
        if (a.aligned != 0) {
          arch::stg128(out + chunk * 16, C::round(o[r]));
        } else {
          VD_UNROLL for (int e = 0; e < kE; ++e) {
            if (chunk * kE + e < a.p.dim) C::store(out + (chunk * kE + e) * a.p.out.stride[4] * C::kBytes, o[r][e]);
          }
        }
      }
    }
  }
}

}  // namespace vdit::gpu::short_attention

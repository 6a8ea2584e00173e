// Means of blocks of tokens on GPUs: deterministic, nothing is read back.
//
//   list_parts  one CTA per row of lengths: cuts blocks into parts of at most kBlockMeanPart positions
//   sum_parts   one warp per part and head: 16-byte pieces of rows, kBatch in flight per lane. A block with one part
//               gets its mean, other parts a slot in the workspace
//   add_parts   one warp per block with more than one part: its slots in order
#include "kernels/select/block_mean.h"

#include "kernels/block_sum.h"

namespace vdit::gpu {
namespace block_mean {

struct F32;  // beside arch::BF16 and arch::F16

constexpr int kListThreads = 512, kThreads = 256, kWarps = kThreads / 32, kBatch = 8;

struct Part {
  int32_t block, first, count, slot;  // slot -1: the only part of its block
};

struct Args {
  BlockMeanParams params;
  int32_t capacity, slots;  // per row of lengths: parts, and parts of blocks with more than one
  int32_t aligned;          // rows of x are made of 16-byte pieces
  int32_t groups;           // CTAs per head of sum_parts, or of add_parts
  int32_t* part_count;      // [rows of lengths]
  int32_t* slot_begin;      // [rows of lengths][n + 1]
  Part* parts;              // [rows of lengths][capacity]
  float* sums;              // [B * H][slots][D]
  int32_t* counted;         // [B * H][slots]
};

VD_DEV int64_t entry(const TokenInts& t, int64_t at) {
  return t.bytes == 8 ? static_cast<const int64_t*>(t.data)[at] : int64_t(static_cast<const int32_t*>(t.data)[at]);
}

VD_DEV int64_t lengths_row(const BlockMeanParams& p, int64_t batch, int64_t head) {
  return (p.lengths_batch == 1 ? 0 : batch) * p.lengths_heads + (p.lengths_heads == 1 ? 0 : head);
}

// A thread owns a strip of neighbouring blocks: positions before it, then parts and slots before it.
VD_KERNEL(kListThreads, 1)
list_parts(const VD_GRID_CONST Args a) {
  VD_SHARED(uint64_t, position_totals, kListThreads / 32);
  VD_SHARED(uint64_t, part_totals, kListThreads / 32);
  const BlockMeanParams& p = a.params;
  const int64_t at = int64_t(blockIdx.x) / p.lengths_heads * p.lengths.batch_stride +
                     int64_t(blockIdx.x) % p.lengths_heads * p.lengths.head_stride;
  const int32_t strip = (p.blocks + kListThreads - 1) / kListThreads;
  const int64_t begin = int64_t(threadIdx.x) * strip, end = begin + strip < p.blocks ? begin + strip : p.blocks;
  auto wanted = [&](int64_t i) {  // lengths come from the device: whatever they are, positions stay inside
    const int64_t n = entry(p.lengths, at + i * p.lengths.stride);
    return uint64_t(n < 0 ? 0 : n < p.tokens ? n : p.tokens);
  };
  uint64_t own = 0;
  for (int64_t i = begin; i < end; ++i) own += wanted(i);
  const uint64_t before = block_inclusive_sum(own, position_totals) - own;
  auto visit = [&](auto each) {  // each(block, first position, positions)
    uint64_t first = before;
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t start = first < uint64_t(p.tokens) ? first : uint64_t(p.tokens), n = wanted(i);
      each(int32_t(i), int32_t(start), int32_t(n < p.tokens - start ? n : p.tokens - start));
      first += n;
    }
  };
  auto parts_of = [](int32_t n) { return n <= kBlockMeanPart ? 1 : (n + kBlockMeanPart - 1) / kBlockMeanPart; };
  uint64_t count = 0;  // parts, and slots in the upper half
  visit([&](int32_t, int32_t, int32_t n) {
    const uint64_t parts = uint64_t(parts_of(n));
    count += parts | (parts > 1 ? parts << 32 : 0);
  });
  const uint64_t total = block_inclusive_sum(count, part_totals);
  auto part = int32_t(total - count), slot = int32_t((total - count) >> 32);
  Part* parts = a.parts + int64_t(blockIdx.x) * a.capacity;
  int32_t* slot_begin = a.slot_begin + int64_t(blockIdx.x) * (p.blocks + 1);
  visit([&](int32_t block, int32_t first, int32_t n) {
    slot_begin[block] = slot;
    const int32_t pieces = parts_of(n);
    for (int32_t k = 0; k < pieces; ++k) {
      const int32_t done = k * kBlockMeanPart, rest = n - done < kBlockMeanPart ? n - done : kBlockMeanPart;
      parts[part++] = Part{block, first + done, rest, pieces > 1 ? slot++ : -1};
    }
  });
  if (threadIdx.x == kListThreads - 1) {
    a.part_count[blockIdx.x] = int32_t(total);
    slot_begin[p.blocks] = int32_t(total >> 32);
  }
}

// How a lane reads its 16-byte piece of a row and adds it.
template <class T>
struct Piece {
  static constexpr int kElements = 8, kBytes = 2;
  VD_STATIC_METHOD uint4 load_single(const char* row, int d, int dim) {
    const auto* from = reinterpret_cast<const uint16_t*>(row) + d;
    uint32_t pair[4];
    VD_UNROLL for (int e = 0; e < 4; ++e) {
      const uint32_t low = d + 2 * e < dim ? from[2 * e] : 0u, high = d + 2 * e + 1 < dim ? from[2 * e + 1] : 0u;
      pair[e] = low | high << 16;
    }
    return uint4{pair[0], pair[1], pair[2], pair[3]};
  }
  VD_STATIC_METHOD void add(float (&sum)[kElements], uint4 v) {
    const uint32_t pair[4] = {v.x, v.y, v.z, v.w};
    VD_UNROLL for (int e = 0; e < 4; ++e) {
      float low, high;
      arch::unpack<T>(pair[e], low, high);
      sum[2 * e] += low;
      sum[2 * e + 1] += high;
    }
  }
};
template <>
struct Piece<F32> {
  static constexpr int kElements = 4, kBytes = 4;
  VD_STATIC_METHOD uint4 load_single(const char* row, int d, int dim) {
    const auto* from = reinterpret_cast<const uint32_t*>(row) + d;
    return uint4{from[0], d + 1 < dim ? from[1] : 0u, d + 2 < dim ? from[2] : 0u, d + 3 < dim ? from[3] : 0u};
  }
  VD_STATIC_METHOD void add(float (&sum)[kElements], uint4 v) {
    const uint32_t word[4] = {v.x, v.y, v.z, v.w};
    VD_UNROLL for (int e = 0; e < 4; ++e) sum[e] += arch::as_float(word[e]);
  }
};

template <class T>
VD_KERNEL(kThreads, 2)
sum_parts(const VD_GRID_CONST Args a) {
  using P = Piece<T>;
  const BlockMeanParams& p = a.params;
  const int lane = threadIdx.x % 32;
  const int64_t sequence = blockIdx.x / a.groups, batch = sequence / p.heads, head = sequence % p.heads;
  const int64_t index = int64_t(blockIdx.x % a.groups) * kWarps + threadIdx.x / 32;
  const int64_t row = lengths_row(p, batch, head);
  if (index >= a.part_count[row]) return;
  const Part part = a.parts[row * a.capacity + index];
  int64_t limit = p.tokens;
  if (p.kv_len.data != nullptr) {
    const int64_t valid = entry(p.kv_len, batch * p.kv_len.batch_stride);
    limit = valid < limit ? valid : limit;
  }
  const int32_t* order = static_cast<const int32_t*>(p.order.data);
  if (order != nullptr) order += batch * p.order.batch_stride + head * p.order.head_stride;
  const char* x = static_cast<const char*>(p.x.data) + (batch * p.x.batch_stride + head * p.x.head_stride) * P::kBytes;
  const int64_t row_bytes = p.x.row_stride * P::kBytes;
  // `width` lanes share a row, 32 / width rows are read at once.
  const int pieces = (p.dim + P::kElements - 1) / P::kElements;
  int width = 1;
  while (width < pieces && width < 32) width *= 2;
  const int at_once = 32 / width, group = lane / width;

  const bool whole = part.slot < 0;
  const int64_t to = whole ? sequence * p.blocks + part.block : sequence * a.slots + part.slot;
  int32_t counted = 0;
  for (int column = 0; column < pieces || column == 0; column += 32) {
    const int d = (column + lane % width) * P::kElements;
    float sum[P::kElements] = {};
    counted = 0;
    for (int32_t base = 0; base < part.count; base += 32) {
      int64_t token = -1;
      if (base + lane < part.count) {
        const int64_t position = int64_t(part.first) + base + lane;
        token = order != nullptr ? int64_t(order[position * p.order.stride]) : position;
      }
      if (token >= limit) token = -1;
      counted += arch::popc(arch::vote_ballot(token >= 0));
      for (int k = 0; k < width && base + k * at_once < part.count; k += kBatch) {
        uint4 v[kBatch];
        VD_UNROLL for (int i = 0; i < kBatch; ++i) {
          const int from = (k + i) * at_once + group;
          const auto read = int32_t(arch::shfl(uint32_t(token), from & 31));
          v[i] = uint4{0, 0, 0, 0};
          if (k + i < width && read >= 0 && d < p.dim) {
            const char* r = x + read * row_bytes;
            v[i] = a.aligned != 0 ? arch::ldg128(r + d * P::kBytes) : P::load_single(r, d, p.dim);
          }
        }
        VD_UNROLL for (int i = 0; i < kBatch; ++i) P::add(sum, v[i]);
      }
    }
    for (int step = width; step < 32; step *= 2) {
      VD_UNROLL for (int e = 0; e < P::kElements; ++e) sum[e] += arch::shfl_xor_f(sum[e], step);
    }
    if (group == 0) {
      float* out = (whole ? p.means : a.sums) + to * p.dim + d;
      const float n = whole && counted > 1 ? float(counted) : 1.f;
      VD_UNROLL for (int e = 0; e < P::kElements; ++e) {
        if (d + e < p.dim) out[e] = sum[e] / n;
      }
    }
  }
  if (lane == 0) (whole ? p.counts : a.counted)[to] = counted;
}

VD_KERNEL(kThreads, 1)
add_parts(const VD_GRID_CONST Args a) {
  const BlockMeanParams& p = a.params;
  const int lane = threadIdx.x % 32;
  const int64_t sequence = blockIdx.x / a.groups;
  const int64_t block = int64_t(blockIdx.x % a.groups) * kWarps + threadIdx.x / 32;
  if (block >= p.blocks) return;
  const int32_t* slot_begin =
      a.slot_begin + lengths_row(p, sequence / p.heads, sequence % p.heads) * (int64_t(p.blocks) + 1) + block;
  const int32_t first = slot_begin[0], parts = slot_begin[1] - first;
  if (parts == 0) return;
  const int64_t from = sequence * a.slots + first, to = sequence * p.blocks + block;
  int32_t counted = 0;
  for (int32_t k = lane; k < parts; k += 32) counted += a.counted[from + k];
  VD_UNROLL for (int step = 16; step > 0; step /= 2) counted += int32_t(arch::shfl_xor(uint32_t(counted), step));
  for (int32_t d = lane; d < p.dim; d += 32) {
    const float* sums = a.sums + from * p.dim + d;
    float sum = 0.f;
    for (int32_t k = 0; k < parts; k += kBatch) {
      float v[kBatch];
      VD_UNROLL for (int i = 0; i < kBatch; ++i) v[i] = k + i < parts ? sums[int64_t(k + i) * p.dim] : 0.f;
      VD_UNROLL for (int i = 0; i < kBatch; ++i) sum += v[i];
    }
    p.means[to * p.dim + d] = counted > 1 ? sum / float(counted) : sum;
  }
  if (lane == 0) p.counts[to] = counted;
}

struct Layout {
  int64_t rows = 0, capacity = 0, slots = 0;
  size_t count_at = 0, begin_at = 0, parts_at = 0, sums_at = 0, counted_at = 0, bytes = 0;
};

Layout layout(const BlockMeanParams& p) {
  Layout l;
  auto place = [&](int64_t bytes) {
    const size_t at = l.bytes;
    l.bytes += size_t((bytes + 15) / 16 * 16);
    return at;
  };
  const int64_t sequences = int64_t(p.batch) * p.heads;
  l.rows = int64_t(p.lengths_batch) * p.lengths_heads;
  l.capacity = int64_t(p.blocks) + p.tokens / kBlockMeanPart;  // an empty block has one part, too
  l.slots = p.tokens / (kBlockMeanPart / 2);                   // n > kBlockMeanPart: at most 2 n / kBlockMeanPart parts
  l.count_at = place(l.rows * 4);
  l.begin_at = place(l.rows * (int64_t(p.blocks) + 1) * 4);
  l.parts_at = place(l.rows * l.capacity * int64_t(sizeof(Part)));
  l.sums_at = place(sequences * l.slots * p.dim * 4);
  l.counted_at = place(sequences * l.slots * 4);
  return l;
}

bool rows_aligned(const BlockMeanParams& p) {
  const int64_t elements = p.dtype == DType::f32 ? 4 : 8;
  return reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0 && p.dim % elements == 0 &&
         (p.batch <= 1 || p.x.batch_stride % elements == 0) && (p.tokens <= 1 || p.x.row_stride % elements == 0) &&
         (p.heads <= 1 || p.x.head_stride % elements == 0);
}

int launch_sums(const Args& args, int64_t blocks, arch::stream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks)), threads(kThreads);
  switch (args.params.dtype) {
    case DType::f32: return arch::launch(sum_parts<F32>, grid, threads, 0, stream, args);
    case DType::f16: return arch::launch(sum_parts<arch::F16>, grid, threads, 0, stream, args);
    case DType::bf16: return arch::launch(sum_parts<arch::BF16>, grid, threads, 0, stream, args);
  }
  return 1;
}

}  // namespace block_mean
}  // namespace vdit::gpu

namespace vdit {

size_t block_mean_workspace_bytes(const BlockMeanParams& p) { return gpu::block_mean::layout(p).bytes; }

int cuda_block_mean(const BlockMeanParams& p, void* workspace, size_t bytes, void* stream) {
  using gpu::block_mean::Args, gpu::block_mean::kWarps;
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  const gpu::block_mean::Layout l = gpu::block_mean::layout(p);
  const int64_t sequences = int64_t(p.batch) * p.heads;
  if (sequences * p.blocks == 0) return 0;
  const int64_t sum_groups = (l.capacity + kWarps - 1) / kWarps, add_groups = (int64_t(p.blocks) + kWarps - 1) / kWarps;
  if (bytes < l.bytes || sequences * sum_groups > INT32_MAX || l.capacity > INT32_MAX) return kInvalid;
  auto* at = static_cast<char*>(workspace);
  Args args{p,
            int32_t(l.capacity),
            int32_t(l.slots),
            gpu::block_mean::rows_aligned(p) ? 1 : 0,
            int32_t(sum_groups),
            reinterpret_cast<int32_t*>(at + l.count_at),
            reinterpret_cast<int32_t*>(at + l.begin_at),
            reinterpret_cast<gpu::block_mean::Part*>(at + l.parts_at),
            reinterpret_cast<float*>(at + l.sums_at),
            reinterpret_cast<int32_t*>(at + l.counted_at)};
  const auto s = static_cast<arch::stream_t>(stream);
  if (const int error = arch::launch(gpu::block_mean::list_parts, dim3(unsigned(l.rows)),
                                     dim3(gpu::block_mean::kListThreads), 0, s, args))
    return error;
  if (const int error = gpu::block_mean::launch_sums(args, sequences * sum_groups, s)) return error;
  if (p.tokens <= kBlockMeanPart) return 0;  // no block has two parts
  args.groups = int32_t(add_groups);
  return arch::launch(gpu::block_mean::add_parts, dim3(unsigned(sequences * add_groups)),
                      dim3(gpu::block_mean::kThreads), 0, s, args);
}

}  // namespace vdit

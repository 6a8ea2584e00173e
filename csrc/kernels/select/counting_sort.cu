// Counting sort on GPUs: stable, deterministic, nothing is read back.
//
//   count     one CTA per chunk of a sequence: how often it has each label
//   offsets   one CTA per sequence: where the first token of each (label, chunk) goes; totals per label
//   scatter   one CTA per chunk: each warp takes its tokens in order, ranks equal labels of a warp by lane
//
// Counters of kSlice labels fit in shared memory; more labels take several passes over the chunk's registers.
#include "kernels/select/counting_sort.h"

#include "kernels/block_sum.h"

namespace vdit::gpu {
namespace counting_sort {

constexpr int kThreads = 256, kWarps = kThreads / 32, kRounds = 8;
constexpr int kChunk = kThreads * kRounds;  // tokens of a CTA
constexpr int kSlice = 1024;
constexpr int kOffsetThreads = 512;
constexpr uint32_t kNone = ~0u;

struct Args {
  CountingSortParams params;
  int32_t chunks;
  int32_t* table;  // [B * H][chunks][classes]: counts, then positions
};

// The label of token `index` of a sequence, clamped; kNone beyond the end.
VD_DEV uint32_t label_of(const CountingSortParams& p, int64_t sequence, int64_t index) {
  if (index >= p.tokens) return kNone;
  const int32_t* labels = static_cast<const int32_t*>(p.labels.data) + sequence / p.heads * p.labels.batch_stride +
                          sequence % p.heads * p.labels.head_stride;
  const int32_t label = labels[index * p.labels.stride];
  return uint32_t(label < 0 ? 0 : label < p.classes ? label : p.classes - 1);
}

VD_KERNEL(kThreads, 1)
count(const VD_GRID_CONST Args a) {
  VD_SHARED(uint32_t, counters, kSlice);
  const CountingSortParams& p = a.params;
  const int64_t sequence = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
  const uint32_t address = arch::smem_u32(counters);
  uint32_t label[kRounds];
  VD_UNROLL for (int r = 0; r < kRounds; ++r) label[r] =
      label_of(p, sequence, chunk * kChunk + r * kThreads + threadIdx.x);
  int32_t* row = a.table + int64_t(blockIdx.x) * p.classes;
  for (int32_t slice = 0; slice < p.classes; slice += kSlice) {
    const int32_t width = p.classes - slice < kSlice ? p.classes - slice : kSlice;
    for (int32_t c = threadIdx.x; c < width; c += kThreads) arch::sts32(address + c * 4, 0);
    arch::syncthreads();
    VD_UNROLL for (int r = 0; r < kRounds; ++r) {
      if (label[r] - uint32_t(slice) < uint32_t(width)) arch::atomic_add(&counters[label[r] - slice], 1);
    }
    arch::syncthreads();
    for (int32_t c = threadIdx.x; c < width; c += kThreads) row[slice + c] = int32_t(arch::lds32(address + c * 4));
    arch::syncthreads();
  }
}

VD_KERNEL(kOffsetThreads, 1)
offsets(const VD_GRID_CONST Args a) {
  VD_SHARED(uint64_t, warp_totals, kOffsetThreads / 32);
  VD_SHARED(uint64_t, tile_total, 1);
  const int32_t classes = a.params.classes;
  int32_t* table = a.table + int64_t(blockIdx.x) * a.chunks * classes;
  uint64_t before = 0;  // tokens of smaller labels
  for (int32_t tile = 0; tile < classes; tile += kOffsetThreads) {
    const int32_t c = tile + int32_t(threadIdx.x);
    uint64_t total = 0;
    if (c < classes)
      for (int32_t k = 0; k < a.chunks; ++k) total += uint32_t(table[int64_t(k) * classes + c]);
    const uint64_t end = block_inclusive_sum(total, warp_totals);
    if (threadIdx.x == kOffsetThreads - 1) tile_total[0] = end;
    if (c < classes) {
      a.params.counts[int64_t(blockIdx.x) * classes + c] = int32_t(total);
      auto at = int32_t(before + end - total);
      for (int32_t k = 0; k < a.chunks; ++k) {
        int32_t& entry = table[int64_t(k) * classes + c];
        const int32_t n = entry;
        entry = at;
        at += n;
      }
    }
    arch::syncthreads();
    before += tile_total[0];  // written again only after the next sum's barrier
  }
}

VD_KERNEL(kThreads, 1)
scatter(const VD_GRID_CONST Args a) {
  VD_SHARED(uint32_t, counters, kWarps* kSlice);
  const CountingSortParams& p = a.params;
  const int64_t sequence = blockIdx.x / a.chunks, chunk = blockIdx.x % a.chunks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t address = arch::smem_u32(counters), own = address + warp * kSlice * 4;
  const uint32_t lanes_below = (1u << lane) - 1;
  // The tokens of a warp are neighbours: token (r, lane) is number 32 r + lane of them.
  const int64_t first = chunk * kChunk + warp * (32 * kRounds) + lane;
  uint32_t label[kRounds], same[kRounds];
  VD_UNROLL for (int r = 0; r < kRounds; ++r) {
    label[r] = label_of(p, sequence, first + 32 * r);
    same[r] = arch::match_any(label[r]);
  }
  const int32_t* row = a.table + int64_t(blockIdx.x) * p.classes;
  int32_t* order = p.order + sequence * p.tokens;
  for (int32_t slice = 0; slice < p.classes; slice += kSlice) {
    const int32_t width = p.classes - slice < kSlice ? p.classes - slice : kSlice;
    for (int32_t c = threadIdx.x; c < kWarps * kSlice; c += kThreads) arch::sts32(address + c * 4, 0);
    arch::syncthreads();
    VD_UNROLL for (int r = 0; r < kRounds; ++r) {  // how many tokens of each label every warp has
      const uint32_t c = label[r] - uint32_t(slice);
      if (c < uint32_t(width) && (same[r] & lanes_below) == 0)
        arch::sts32(own + c * 4, arch::lds32(own + c * 4) + uint32_t(arch::popc(same[r])));
      arch::syncwarp();
    }
    arch::syncthreads();
    for (int32_t c = threadIdx.x; c < width; c += kThreads) {  // where the first of them goes
      auto at = uint32_t(row[slice + c]);
      VD_UNROLL for (int w = 0; w < kWarps; ++w) {
        const uint32_t n = arch::lds32(address + (w * kSlice + c) * 4);
        arch::sts32(address + (w * kSlice + c) * 4, at);
        at += n;
      }
    }
    arch::syncthreads();
    VD_UNROLL for (int r = 0; r < kRounds; ++r) {
      const uint32_t c = label[r] - uint32_t(slice);
      const bool here = c < uint32_t(width);
      const uint32_t at = here ? arch::lds32(own + c * 4) : 0;
      if (here) order[at + uint32_t(arch::popc(same[r] & lanes_below))] = int32_t(first + 32 * r);
      arch::syncwarp();
      if (here && (same[r] & lanes_below) == 0) arch::sts32(own + c * 4, at + uint32_t(arch::popc(same[r])));
      arch::syncwarp();
    }
    arch::syncthreads();
  }
}

int64_t chunks_of(const CountingSortParams& p) { return (int64_t(p.tokens) + kChunk - 1) / kChunk; }

}  // namespace counting_sort
}  // namespace vdit::gpu

namespace vdit {

using gpu::counting_sort::Args;

size_t counting_sort_workspace_bytes(const CountingSortParams& p) {
  return size_t(int64_t(p.batch) * p.heads * gpu::counting_sort::chunks_of(p) * p.classes) * 4;
}

int cuda_counting_sort(const CountingSortParams& p, void* workspace, size_t bytes, void* stream) {
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  const int64_t sequences = int64_t(p.batch) * p.heads, chunks = gpu::counting_sort::chunks_of(p);
  if (p.classes < 1 || bytes < counting_sort_workspace_bytes(p) || sequences * (chunks + 1) > INT32_MAX)
    return kInvalid;
  if (sequences == 0) return 0;
  const Args args{p, int32_t(chunks), static_cast<int32_t*>(workspace)};
  const auto s = static_cast<arch::stream_t>(stream);
  const dim3 threads(gpu::counting_sort::kThreads), grid(unsigned(sequences * chunks));
  if (chunks > 0)
    if (const int error = arch::launch(gpu::counting_sort::count, grid, threads, 0, s, args)) return error;
  if (const int error = arch::launch(gpu::counting_sort::offsets, dim3(unsigned(sequences)),
                                     dim3(gpu::counting_sort::kOffsetThreads), 0, s, args))
    return error;
  return chunks > 0 ? arch::launch(gpu::counting_sort::scatter, grid, threads, 0, s, args) : 0;
}

}  // namespace vdit

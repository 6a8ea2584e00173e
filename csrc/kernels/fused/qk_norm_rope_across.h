// RMS over all heads of a token: one CTA per token and tensor, kChunks chunks of eight channels per thread.
#pragma once
#include "kernels/fused/qk_chunk.h"

namespace vdit::gpu {
namespace qk {

constexpr int kMaxAcrossThreads = 512;

struct AcrossBlocks {
  int32_t end[3];       // one past the last block of each stream
  int32_t head_chunks;  // chunks of one head
};

template <class E, bool Vector, int kChunks>
VD_KERNEL(kMaxAcrossThreads, 1)
norm_across(const VD_GRID_CONST QkNormRopeParams p, const VD_GRID_CONST AcrossBlocks blocks) {
  constexpr int kBytes = Element<E>::kBytes;
  VD_SHARED(uint32_t, partial, kMaxAcrossThreads / 32);
  VD_DYN_SMEM(dynamic);
  const int which = int(blockIdx.x) < blocks.end[0] ? 0 : int(blockIdx.x) < blocks.end[1] ? 1 : 2;
  const QkStream& s = p.stream[which];
  const int64_t token = int(blockIdx.x) - (which == 0 ? 0 : blocks.end[which - 1]);
  const int64_t b = token / s.tokens, n = token - b * s.tokens;
  const int chunks = s.heads * blocks.head_chunks;
  const char* x = static_cast<const char*>(s.x.data) + (b * s.x.batch_stride + n * s.x.row_stride) * kBytes;

  // Everything that does not wait for the reduction is asked for before it, angles where registers allow.
  constexpr bool kEarlyAngles = kChunks <= 2;
  float v[kChunks][kChunk], w[kChunks][kChunk], bias[kChunks][kChunk];
  Angles angles[kEarlyAngles ? kChunks : 1];
  int64_t offset[kChunks];
  float squares = 0.0f;
  VD_UNROLL for (int j = 0; j < kChunks; ++j) {
    const int chunk = threadIdx.x + j * blockDim.x, head = chunk / blocks.head_chunks;
    const int column = (chunk - head * blocks.head_chunks) * kChunk;
    const int left = p.dim - column < kChunk ? p.dim - column : kChunk, channels = chunk < chunks ? left : 0;
    load8<E, Vector>(x + (head * s.x.head_stride + column) * kBytes, channels, v[j]);
    const int64_t at = int64_t(head) * p.dim + column;
    if (s.weight != nullptr) load8<Vector>(s.weight, s.weight_dtype, at, channels, w[j]);
    if (s.bias != nullptr) load8<Vector>(s.bias, s.weight_dtype, at, channels, bias[j]);
    offset[j] = channels > 0 ? angle_offset(s.rope, b, head, n) : -1;
    if constexpr (kEarlyAngles) {
      if (offset[j] >= 0) load_angles<Vector>(p, s.rope, offset[j], column, angles[j]);
    }
    VD_UNROLL for (int e = 0; e < kChunk; ++e) squares += v[j][e] * v[j][e];
  }

  float scale = 1.0f;
  if (s.copy == 0) {  // the same for the whole block
    VD_UNROLL for (int step = 16; step > 0; step /= 2) squares += arch::shfl_xor_f(squares, step);
    const uint32_t sums = arch::smem_u32(partial);
    if (threadIdx.x % 32 == 0) arch::sts32(sums + threadIdx.x / 32 * 4, arch::as_uint(squares));
    arch::syncthreads();
    float sum = 0.0f;
    for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) sum += arch::as_float(arch::lds32(sums + warp * 4));
    scale = 1.0f / sqrtf(sum / (float(s.heads) * float(p.dim)) + p.eps);
    VD_UNROLL for (int j = 0; j < kChunks; ++j) finish<E>(p, s, 0.0f, scale, w[j], bias[j], v[j]);
  }

  const uint32_t row = arch::smem_u32(dynamic);
  const bool exchange = s.rope.cos != nullptr && p.axes != 0;
  if (exchange) {
    VD_UNROLL for (int j = 0; j < kChunks; ++j) {
      const int chunk = threadIdx.x + j * blockDim.x;
      if (chunk < chunks) put_chunk(row, chunks, chunk, v[j]);
    }
    arch::syncthreads();
  }
  VD_UNROLL for (int j = 0; j < kChunks; ++j) {
    const int chunk = threadIdx.x + j * blockDim.x, head = chunk / blocks.head_chunks;
    if (chunk >= chunks) continue;
    const int column = (chunk - head * blocks.head_chunks) * kChunk;
    const int channels = p.dim - column < kChunk ? p.dim - column : kChunk;
    if (offset[j] >= 0) {
      float other[kChunk];
      if (exchange)
        get_partners<Vector>(p, row, chunks, head * blocks.head_chunks, column, other);
      else
        neighbours(v[j], other);
      Angles& a = angles[kEarlyAngles ? j : 0];
      if constexpr (!kEarlyAngles) load_angles<Vector>(p, s.rope, offset[j], column, a);
      turn<E>(p, column, a, other, v[j]);
    }
    char* out = destination<E>(s, b, head, n);
    if (out != nullptr) store8<E, Vector>(out + column * kBytes, channels, v[j]);
  }
}

template <class E, bool Vector, int kChunks>
int launch_across(const QkNormRopeParams& p, int64_t chunks, arch::stream_t stream) {
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  AcrossBlocks blocks{};
  blocks.head_chunks = (p.dim + kChunk - 1) / kChunk;
  int64_t end = 0;
  for (int i = 0; i < 3; ++i) {
    if (i < p.streams && p.stream[i].heads > 0) end += int64_t{p.batch} * p.stream[i].tokens;
    if (end > INT32_MAX) return kInvalid;
    blocks.end[i] = int32_t(end);
  }
  if (end == 0) return 0;
  const int64_t threads = ((chunks + kChunks - 1) / kChunks + 31) / 32 * 32;
  if (threads > kMaxAcrossThreads) return kInvalid;
  const size_t bytes = p.axes != 0 ? size_t(chunks) * kChunk * 4 : 0;
  return arch::launch(norm_across<E, Vector, kChunks>, dim3(unsigned(end)), dim3(unsigned(threads)), bytes, stream, p,
                      blocks);
}

}  // namespace qk
}  // namespace vdit::gpu

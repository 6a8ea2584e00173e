// RMS over all heads of a token: one CTA per token and tensor, kChunks chunks of eight channels per thread.
// With two chunks, 64 registers: several CTAs share an SM, and one's loads run under another's reduction.
#pragma once
#include "kernels/fused/qk_chunk.h"

namespace vdit::gpu {
namespace qk {

constexpr int kMaxAcrossThreads = 512;

struct AcrossBlocks {
  int32_t end[3];       // one past the last block of each stream
  int32_t head_chunks;  // chunks of one head
};

struct Spot {
  int chunk, head, column, channels;  // no channels: beyond the last head
};
VD_DEV Spot spot(const QkNormRopeParams& p, int head_chunks, int chunks, int j) {
  const int chunk = threadIdx.x + j * blockDim.x, head = chunk / head_chunks;
  const int column = (chunk - head * head_chunks) * kChunk;
  const int left = p.dim - column < kChunk ? p.dim - column : kChunk;
  return {chunk, head, column, chunk < chunks ? left : 0};
}

template <class E, bool Vector, int kChunks>
VD_KERNEL(kMaxAcrossThreads, kChunks <= 2 ? 2 : 1)
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

  // The weight does not wait for the reduction. The angles do: all heads of a token share them, mostly, so that they
  // come from the L1 cache, and they would fill the registers of another CTA.
  float v[kChunks][kChunk], w[kChunks][kChunk];
  float squares = 0.0f;
  VD_UNROLL for (int j = 0; j < kChunks; ++j) {
    const Spot at = spot(p, blocks.head_chunks, chunks, j);
    load8<E, Vector>(x + (at.head * s.x.head_stride + at.column) * kBytes, at.channels, v[j]);
    if (s.weight != nullptr)
      load8<Vector>(s.weight, s.weight_dtype, int64_t(at.head) * p.dim + at.column, at.channels, w[j]);
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
    VD_UNROLL for (int j = 0; j < kChunks; ++j) {
      const Spot at = spot(p, blocks.head_chunks, chunks, j);
      float bias[kChunk];
      if (s.bias != nullptr)
        load8<Vector>(s.bias, s.weight_dtype, int64_t(at.head) * p.dim + at.column, at.channels, bias);
      finish<E>(p, s, 0.0f, scale, w[j], bias, v[j]);
    }
  }

  const uint32_t row = arch::smem_u32(dynamic);
  const bool exchange = s.rope.cos != nullptr && p.axes != 0;
  if (exchange) {
    VD_UNROLL for (int j = 0; j < kChunks; ++j) {
      const Spot at = spot(p, blocks.head_chunks, chunks, j);
      if (at.channels > 0) put_chunk(row, chunks, at.chunk, v[j]);
    }
    arch::syncthreads();
  }
  VD_UNROLL for (int j = 0; j < kChunks; ++j) {
    const Spot at = spot(p, blocks.head_chunks, chunks, j);
    if (at.channels == 0) continue;
    const int64_t offset = angle_offset(s.rope, b, at.head, n);
    if (offset >= 0) {
      Angles angles;
      load_angles<Vector>(p, s.rope, offset, at.column, angles);
      float other[kChunk];
      if (exchange)
        get_partners<Vector>(p, row, chunks, at.head * blocks.head_chunks, at.column, other);
      else
        neighbours(v[j], other);
      turn<E>(p, at.column, angles, other, v[j]);
    }
    char* out = destination<E>(s, b, at.head, n);
    if (out != nullptr) store8<E, Vector>(out + at.column * kBytes, at.channels, v[j]);
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

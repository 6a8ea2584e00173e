// Norms over one head, or none: LANES lanes per row of up to 8 * LANES channels, kHeads heads of one token at a time.
// The heads' rows are in flight together and share the token's angles and the weight.
#pragma once
#include "kernels/fused/qk_chunk.h"

namespace vdit::gpu {
namespace qk {

constexpr int kThreads = 256, kHeads = 4;

// Blocks of q, k and v: a block works for one stream, so that its warps stay together.
struct Blocks {
  int32_t end[3];  // one past the last block of each stream
};

template <int LANES>
VD_DEV float sum_lanes(float x) {
  VD_UNROLL for (int step = LANES / 2; step > 0; step /= 2) x += arch::shfl_xor_f(x, step);
  return x;
}

template <class E, bool Vector, int LANES>
VD_KERNEL(kThreads, Vector ? 2 : 1)  // element-wise loads need more registers than two CTAs leave
norm_heads(const VD_GRID_CONST QkNormRopeParams p, const VD_GRID_CONST Blocks blocks) {
  constexpr int kRows = kThreads / LANES, kBytes = Element<E>::kBytes, kRow = LANES * kChunk * 4;
  VD_SHARED(uint32_t, exchange, 2 * kThreads * kChunk);
  const int which = int(blockIdx.x) < blocks.end[0] ? 0 : int(blockIdx.x) < blocks.end[1] ? 1 : 2;
  const QkStream& s = p.stream[which];
  const int lane = threadIdx.x % LANES, column = lane * kChunk;
  const int channels = p.dim - column < kChunk ? p.dim - column : kChunk;  // below 1: an idle lane

  const int groups = (s.heads + kHeads - 1) / kHeads;
  const int64_t unit =
      int64_t(int(blockIdx.x) - (which == 0 ? 0 : blocks.end[which - 1])) * kRows + threadIdx.x / LANES;
  const int64_t token = unit / groups;
  const int first = int(unit - token * groups) * kHeads;
  const int64_t b = token / s.tokens, n = token - b * s.tokens;
  const int heads = b >= p.batch ? 0 : s.heads - first < kHeads ? s.heads - first : kHeads;
  const char* x = static_cast<const char*>(s.x.data) +
                  (b * s.x.batch_stride + n * s.x.row_stride + first * s.x.head_stride + column) * kBytes;

  // Everything that does not wait for the reduction is asked for before it.
  float v[kHeads][kChunk], w[kChunk], bias[kChunk];
  char* out[kHeads];
  VD_UNROLL for (int h = 0; h < kHeads; ++h) {
    load8<E, Vector>(x + h * s.x.head_stride * kBytes, h < heads ? channels : 0, v[h]);
  }
  if (s.weight != nullptr) load8<Vector>(s.weight, s.weight_dtype, column, channels, w);
  if (s.bias != nullptr) load8<Vector>(s.bias, s.weight_dtype, column, channels, bias);
  VD_UNROLL for (int h = 0; h < kHeads; ++h) out[h] = h < heads ? destination<E>(s, b, first + h, n) : nullptr;
  if (s.copy != 0) {
    VD_UNROLL for (int h = 0; h < kHeads; ++h) {
      if (out[h] != nullptr) store8<E, Vector>(out[h] + column * kBytes, channels, v[h]);
    }
    return;
  }
  const bool shared_angles = s.rope.head_stride == 0 && s.rope.positions.head_stride == 0;
  Angles angles;
  int64_t offset = heads > 0 ? angle_offset(s.rope, b, first, n) : -1;
  if (shared_angles && offset >= 0) load_angles<Vector>(p, s.rope, offset, column, angles);

  float mean[kHeads], scale[kHeads];
  const float count = float(p.dim);
  VD_UNROLL for (int h = 0; h < kHeads; ++h) {
    mean[h] = 0.0f;
    scale[h] = 1.0f;
    if (p.norm == QkNorm::layer) {
      float sum = 0.0f;
      VD_UNROLL for (int e = 0; e < kChunk; ++e) sum += v[h][e];
      mean[h] = sum_lanes<LANES>(sum) / count;
    }
    if (p.norm != QkNorm::none) {
      float squares = 0.0f;
      VD_UNROLL for (int e = 0; e < kChunk; ++e) {
        const float d = e < channels ? v[h][e] - mean[h] : 0.0f;
        squares += d * d;
      }
      scale[h] = 1.0f / sqrtf(sum_lanes<LANES>(squares) / count + p.eps);
    }
  }

  const uint32_t row = arch::smem_u32(exchange) + threadIdx.x / LANES * kRow;
  VD_UNROLL for (int h = 0; h < kHeads; ++h) {
    finish<E>(p, s, mean[h], scale[h], w, bias, v[h]);
    if (s.rope.cos != nullptr) {
      float other[kChunk];
      if (p.axes != 0) {  // two buffers in turn: a lane that writes one has met all that read it at the other's barrier
        const uint32_t mine = row + h % 2 * (kRows * kRow);
        put_chunk(mine, LANES, lane, v[h]);
        arch::syncwarp();
        get_partners<Vector>(p, mine, LANES, 0, column, other);
      } else {
        neighbours(v[h], other);
      }
      if (!shared_angles) {
        offset = h < heads ? angle_offset(s.rope, b, first + h, n) : -1;
        if (offset >= 0) load_angles<Vector>(p, s.rope, offset, column, angles);
      }
      if (offset >= 0) turn<E>(p, column, angles, other, v[h]);
    }
    if (out[h] != nullptr) store8<E, Vector>(out[h] + column * kBytes, channels, v[h]);
  }
}

template <class E, bool Vector, int LANES>
int launch_heads(const QkNormRopeParams& p, arch::stream_t stream) {
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  constexpr int kRows = kThreads / LANES;
  Blocks blocks{};
  int64_t end = 0;
  for (int i = 0; i < 3; ++i) {
    if (i < p.streams) {
      const int64_t groups = (p.stream[i].heads + kHeads - 1) / kHeads;
      end += (groups * p.batch * p.stream[i].tokens + kRows - 1) / kRows;
    }
    if (end > INT32_MAX) return kInvalid;
    blocks.end[i] = int32_t(end);
  }
  if (end == 0) return 0;
  return arch::launch(norm_heads<E, Vector, LANES>, dim3(unsigned(end)), dim3(kThreads), 0, stream, p, blocks);
}

}  // namespace qk
}  // namespace vdit::gpu

// QK norm, RoPE and placement on GPUs: the choice of kernel, vector width and lanes per row.
#include "kernels/fused/qk_norm_rope.h"

#include "kernels/fused/qk_norm_rope_across.h"
#include "kernels/fused/qk_norm_rope_head.h"

namespace vdit {
namespace {

using namespace gpu::qk;

bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % 16 == 0 && bytes % 16 == 0; }

// Strides of dimensions of one entry are never used.
int64_t used(int64_t size, int64_t stride) { return size > 1 ? stride : 0; }

bool vector_stream(const QkNormRopeParams& p, const QkStream& s, int64_t bytes) {
  const int64_t x = used(p.batch, s.x.batch_stride) | used(s.tokens, s.x.row_stride) | used(s.heads, s.x.head_stride);
  const int64_t out =
      used(p.batch, s.out_batch_stride) | used(s.out_tokens, s.out_row_stride) | used(s.heads, s.out_head_stride);
  if (!aligned(s.x.data, x * bytes) || !aligned(s.out, out * bytes)) return false;
  if (!aligned(s.weight, 0) || !aligned(s.bias, 0)) return false;
  if (s.rope.cos == nullptr) return true;
  const RopeTable& r = s.rope;
  const int64_t table = r.batch_stride | r.head_stride | used(r.rows, r.row_stride);
  const int64_t entry = r.dtype == DType::f32 ? 4 : 2;
  return aligned(r.cos, table * entry) && aligned(r.sin, table * entry);
}

// Whether every chunk of eight channels, and of the tables, may be moved in pieces of 16 bytes.
bool vector_fits(const QkNormRopeParams& p) {
  if (p.dim % kChunk != 0) return false;
  for (int axis = 0; axis < p.axes; ++axis)
    if (p.width[axis] % (2 * kChunk) != 0) return false;
  for (int i = 0; i < p.streams; ++i)
    if (!vector_stream(p, p.stream[i], p.dtype == DType::f32 ? 4 : 2)) return false;
  return true;
}

template <class E>
int choose(const QkNormRopeParams& p, arch::stream_t stream) {
  const bool vector = vector_fits(p);
  const int head_chunks = (p.dim + kChunk - 1) / kChunk;
  if (p.norm != QkNorm::rms_across) {
    if (!vector) return launch_heads<E, false, 32>(p, stream);
    if (head_chunks <= 8) return launch_heads<E, true, 8>(p, stream);
    if (head_chunks <= 16) return launch_heads<E, true, 16>(p, stream);
    return launch_heads<E, true, 32>(p, stream);
  }
  int64_t chunks = 0;
  for (int i = 0; i < p.streams; ++i) {
    const int64_t own = int64_t{p.stream[i].heads} * head_chunks;
    chunks = own > chunks ? own : chunks;
  }
  if (!vector) return launch_across<E, false, 4>(p, chunks, stream);
  if (chunks <= 2 * kMaxAcrossThreads) return launch_across<E, true, 2>(p, chunks, stream);
  return launch_across<E, true, 4>(p, chunks, stream);
}

}  // namespace

int cuda_qk_norm_rope(const QkNormRopeParams& p, void* stream) {
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  if (p.dim == 0 || p.batch == 0) return 0;
  if (p.dim > kMaxHeadDim) return kInvalid;
  const auto s = static_cast<arch::stream_t>(stream);
  switch (p.dtype) {
    case DType::f32: return choose<float>(p, s);
    case DType::f16: return choose<arch::F16>(p, s);
    case DType::bf16: return choose<arch::BF16>(p, s);
  }
  return kInvalid;
}

}  // namespace vdit

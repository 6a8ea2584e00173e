// Attention over short sequences on GPUs: a warp per sequence. Loads of one warp hide behind the work of the others,
// of which shared memory holds a dozen and more per multiprocessor.
#include "kernels/short/short_attention.h"

#include <type_traits>

#include "kernels/short/matrix.h"

namespace vdit::gpu {
namespace short_attention {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

VD_DEV uint32_t item_index() { return blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; }

// kSteps: keys / 16 on tensor cores; 0: multiply-add, for every dtype and stride.
template <class T, int kSteps>
VD_KERNEL(kThreads, 4)
attend(const VD_GRID_CONST Args a) {
  VD_DYN_SMEM(memory);
  const uint32_t index = item_index();
  if (index >= a.items) return;  // whole warps
  const Item item = item_at(a, index);
  const uint32_t slice = arch::smem_u32(memory) + threadIdx.x / 32 * a.slice;
  const int staged_keys = kSteps > 0 ? 16 * kSteps : item.keys;
  const int staged_rows = (item.rows < kRowsStaged ? item.rows + 15 : kRowsStaged) / 16 * 16;

  stage<T>(a, item, a.p.k, 0, item.keys, staged_keys, slice);
  stage<T>(a, item, a.p.q, item.first, item.rows < staged_rows ? item.rows : staged_rows, staged_rows,
           slice + a.queries);
  arch::cp_async_commit();
  stage<T>(a, item, a.p.v, 0, item.keys, staged_keys, slice + a.values);
  arch::cp_async_commit();
  bool plain = kSteps == 0;
  if (plain || a.p.causal != 0) {
    arch::cp_async_wait<0>();
    arch::syncwarp();
    // A value that is not finite must be kept from the rows that do not read it, and 0 * NaN is NaN.
    if constexpr (kSteps > 0) plain = any_not_finite<T>(a, slice + a.values, item.keys);
  } else {
    arch::cp_async_wait<1>();
    arch::syncwarp();
  }
  for (int done = 0; done < item.rows; done += kRowsStaged) {
    const int left = item.rows - done, count = left < kRowsStaged ? left : kRowsStaged;
    if (done > 0) {
      arch::syncwarp();  // the last rows have left
      stage<T>(a, item, a.p.q, item.first + done, count, kRowsStaged, slice + a.queries);
      arch::cp_async_commit();
      arch::cp_async_wait<0>();
      arch::syncwarp();
    }
    if (plain) {
      plain_rows<T>(a, item, slice, item.first + done, count);
      continue;
    }
    if constexpr (kSteps > 0) {
      for (int row = 0; row < count; row += 16)
        matrix_rows<T, kSteps>(a, item, slice, slice + a.queries + row * a.pitch, item.first + done + row,
                               count - row < 16 ? count - row : 16);
    }
  }
}

// One key: every row that reads it gets its value, bit for bit.
template <class T>
VD_KERNEL(kThreads, 1)
spread(const VD_GRID_CONST Args a) {
  using C = Chunk<T>;
  const uint32_t index = item_index();
  if (index >= a.items) return;
  const Item item = item_at(a, index);
  const int lane = threadIdx.x % 32;
  const char* from = static_cast<const char*>(a.p.v.data) + row_offset(a.p.v, item, 0) * C::kBytes;
  char* out =
      const_cast<char*>(static_cast<const char*>(a.p.out.data)) + row_offset(a.p.out, item, item.first) * C::kBytes;
  const int64_t row_bytes = a.p.out.stride[1] * C::kBytes;
  const int elements = a.aligned != 0 ? C::kElements : 1;
  for (int d = lane * elements; d < a.p.dim; d += 32 * elements) {
    if (a.aligned != 0) {
      const uint4 value = item.keys > 0 ? arch::ldg128(from + d * C::kBytes) : uint4{0, 0, 0, 0};
      for (int i = 0; i < item.rows; ++i)
        arch::stg128(out + i * row_bytes + d * C::kBytes,
                     keys_of_row(a, item, item.first + i) > 0 ? value : uint4{0, 0, 0, 0});
    } else {
      using Bits = std::conditional_t<C::kBytes == 2, uint16_t, uint32_t>;
      const Bits value = item.keys > 0 ? *reinterpret_cast<const Bits*>(from + d * a.p.v.stride[4] * C::kBytes) : 0;
      for (int i = 0; i < item.rows; ++i)
        *reinterpret_cast<Bits*>(out + i * row_bytes + d * a.p.out.stride[4] * C::kBytes) =
            keys_of_row(a, item, item.first + i) > 0 ? value : Bits(0);
    }
  }
}

bool view_aligned(const ShortAttentionParams& p, const ShortView& x, int64_t rows) {
  const int64_t elements = p.dtype == DType::f32 ? 4 : 8, sizes[4] = {p.batch, rows, p.places, p.heads};
  bool aligned = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.stride[4] == 1 || p.dim == 1);
  for (int i = 0; i < 4; ++i) aligned = aligned && (sizes[i] <= 1 || x.stride[i] % elements == 0);
  return aligned && p.dim % elements == 0;
}

template <class T>
int launch_steps(const Args& a, int steps, dim3 grid, dim3 threads, size_t bytes, arch::stream_t stream) {
  switch (steps) {
    case 1: return arch::launch(attend<T, 1>, grid, threads, bytes, stream, a);
    case 2: return arch::launch(attend<T, 2>, grid, threads, bytes, stream, a);
    case 3: return arch::launch(attend<T, 3>, grid, threads, bytes, stream, a);
    default: return arch::launch(attend<T, 4>, grid, threads, bytes, stream, a);
  }
}

template <class T>
int launch(Args a, arch::stream_t stream) {
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  constexpr bool kMatrix = Chunk<T>::kBytes == 2;
  constexpr uint32_t kShared = 48 * 1024;  // what every GPU gives a block
  const ShortAttentionParams& p = a.p;
  a.aligned = view_aligned(p, p.q, p.lq) && view_aligned(p, p.k, p.lk) && view_aligned(p, p.v, p.lk) &&
              view_aligned(p, p.out, p.lq);
  const bool matrix = kMatrix && a.aligned != 0;
  const int steps = matrix ? (p.lk + 15) / 16 : 0;
  a.row_blocks = uint32_t((p.lq + kRowsPerItem - 1) / kRowsPerItem);
  const int64_t items = p.batch * p.places * p.heads * int64_t(a.row_blocks);
  if (items > INT32_MAX) return kInvalid;
  a.items = uint32_t(items);
  a.chunks = (p.dim + Chunk<T>::kElements - 1) / Chunk<T>::kElements;
  if (matrix) a.chunks += a.chunks % 2;
  a.pitch = uint32_t(a.chunks + 1 - a.chunks % 2) * 16;
  a.values = uint32_t(matrix ? 16 * steps : p.lk) * a.pitch;
  a.queries = 2 * a.values;
  a.slice = a.queries + uint32_t(p.lq <= 16 ? 16 : kRowsStaged) * a.pitch;
  const uint32_t fit = kShared / a.slice;
  const uint32_t warps = p.lk == 1 || fit >= kWarps ? kWarps : fit < 1 ? 1 : fit;
  const dim3 grid(unsigned((a.items - 1) / warps + 1)), threads(32 * warps);
  if (p.lk == 1) return arch::launch(spread<T>, grid, threads, 0, stream, a);
  const size_t bytes = size_t(warps) * a.slice;
  if constexpr (kMatrix) {
    if (steps > 0) return launch_steps<T>(a, steps, grid, threads, bytes, stream);
  }
  return arch::launch(attend<T, 0>, grid, threads, bytes, stream, a);
}

}  // namespace short_attention
}  // namespace vdit::gpu

namespace vdit {

int cuda_short_attention(const ShortAttentionParams& p, void* stream) {
  if (p.batch * p.places * p.heads * p.lq == 0) return 0;
  gpu::short_attention::Args args{};
  args.p = p;
  const auto s = static_cast<arch::stream_t>(stream);
  switch (p.dtype) {
    case DType::f32: return gpu::short_attention::launch<gpu::short_attention::F32>(args, s);
    case DType::f16: return gpu::short_attention::launch<arch::F16>(args, s);
    case DType::bf16: return gpu::short_attention::launch<arch::BF16>(args, s);
  }
  return 1;
}

}  // namespace vdit

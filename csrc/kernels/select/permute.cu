// Rows of tokens in permuted order on GPUs. A CTA moves kRows positions of one head: the order is read once, rows in
// the widest pieces that their alignment allows, kBatch of them in flight per thread.
#include "kernels/select/permute.h"

#include "arch/arch.h"
#include "kernels/piece.h"

namespace vdit::gpu {
namespace permute {

constexpr int kThreads = 256, kRows = 64, kBatch = 4;

template <class Piece>
VD_KERNEL(kThreads, 1)
move_rows(const VD_GRID_CONST PermuteParams p, int32_t pieces, int32_t tiles) {
  VD_SHARED(uint32_t, tokens, kRows);
  const uint32_t ids = arch::smem_u32(tokens);
  const int64_t head = blockIdx.x / tiles % p.heads, batch = blockIdx.x / tiles / p.heads;
  const int64_t begin = int64_t(blockIdx.x % tiles) * kRows;
  const int rows = int(p.tokens - begin < kRows ? p.tokens - begin : kRows);
  if (int(threadIdx.x) < rows) {
    const int32_t* order =
        static_cast<const int32_t*>(p.order.data) + batch * p.order.batch_stride + head * p.order.head_stride;
    const int32_t token = order[(begin + threadIdx.x) * p.order.stride];
    arch::sts32(ids + threadIdx.x * 4, token >= 0 && token < p.tokens ? uint32_t(token) : 0u);
  }
  arch::syncthreads();
  const char* x =
      static_cast<const char*>(p.x.data) + (batch * p.x.batch_stride + head * p.x.head_stride) * p.element_bytes;
  const int64_t x_row = p.x.row_stride * p.element_bytes;
  Piece* out = static_cast<Piece*>(p.out) + (batch * p.tokens * p.heads + head) * pieces;
  const int32_t total = rows * pieces;
  for (int32_t first = threadIdx.x; first < total; first += kThreads * kBatch) {
    Piece piece[kBatch];
    int64_t to[kBatch];
    VD_UNROLL for (int k = 0; k < kBatch; ++k) {
      const int32_t i = first + k * kThreads;
      if (i >= total) continue;
      const int32_t row = i / pieces, column = i - row * pieces;
      const int64_t position = begin + row, token = arch::lds32(ids + row * 4);
      const int64_t from = p.inverse != 0 ? position : token;
      to[k] = (p.inverse != 0 ? token : position) * p.heads * pieces + column;
      piece[k] = load_piece(reinterpret_cast<const Piece*>(x + from * x_row) + column);
    }
    VD_UNROLL for (int k = 0; k < kBatch; ++k) {
      if (first + k * kThreads < total) store_piece(out + to[k], piece[k]);
    }
  }
}

template <class Piece>
int launch(const PermuteParams& p, int64_t blocks, int64_t tiles, arch::stream_t stream) {
  const int64_t pieces = int64_t(p.dim) * p.element_bytes / int64_t(sizeof(Piece));
  return arch::launch(move_rows<Piece>, dim3(unsigned(blocks)), dim3(kThreads), 0, stream, p, int32_t(pieces),
                      int32_t(tiles));
}

}  // namespace permute
}  // namespace vdit::gpu

namespace vdit {

int cuda_permute_tokens(const PermuteParams& p, void* stream) {
  using namespace gpu::permute;
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  const int64_t tiles = (int64_t(p.tokens) + kRows - 1) / kRows, blocks = tiles * p.heads * p.batch;
  if (blocks * p.dim == 0) return 0;
  if (blocks > INT32_MAX || int64_t(p.dim) * kRows > INT32_MAX) return kInvalid;
  // Bytes that divide the address of every row.
  uint64_t all =
      reinterpret_cast<uintptr_t>(p.x.data) | reinterpret_cast<uintptr_t>(p.out) | uint64_t(p.dim) * p.element_bytes;
  if (p.batch > 1) all |= uint64_t(p.x.batch_stride) * p.element_bytes;
  if (p.tokens > 1) all |= uint64_t(p.x.row_stride) * p.element_bytes;
  if (p.heads > 1) all |= uint64_t(p.x.head_stride) * p.element_bytes;
  const auto s = static_cast<arch::stream_t>(stream);
  if (all % 16 == 0) return launch<uint4>(p, blocks, tiles, s);
  if (all % 4 == 0) return launch<uint32_t>(p, blocks, tiles, s);
  return launch<uint16_t>(p, blocks, tiles, s);
}

}  // namespace vdit

// Slices as they are. The y index of a CTA is a slice of a tensor, the x index kPiecesPerCta neighbouring pieces of it
// in the buffer: buffer accesses are one run, those of the tensor runs of at least a head. Pieces are the widest that
// all addresses allow, kBatch of them in flight per thread.
#pragma once
#include "arch/arch.h"
#include "kernels/pack/pack.h"
#include "kernels/piece.h"

namespace vdit::gpu::pack {

constexpr int kThreads = 256, kBatch = 4, kPiecesPerCta = 8 * kThreads;

// Where head `vector` of a slice begins, heads being numbered [B, rows, heads].
VD_DEV char* head_of(const PackTensor& t, const PackSlice& s, uint32_t vector) {
  const uint32_t head = vector % s.heads, line = vector / s.heads;
  const uint32_t row = line % s.rows, batch = line / s.rows;
  return s.data + batch * t.batch + row * t.row + head * t.head;
}

template <class Piece, bool kPack>
VD_KERNEL(kThreads, 1)
move_slices(const VD_GRID_CONST PackParams p) {
  const int32_t tensor = blockIdx.y % p.tensors;
  const PackTensor& t = p.tensor[tensor];
  const PackSlice s = pack_slice(p, tensor, blockIdx.y / p.tensors);
  const uint32_t pieces = uint32_t(int64_t(t.dim) * p.element / int64_t(sizeof(Piece)));  // of a head
  const uint32_t total = uint32_t(p.batch) * s.rows * s.heads * pieces;
  const int64_t step = t.channel == p.element ? int64_t(sizeof(Piece)) : t.channel;
  const uint32_t begin = blockIdx.x * kPiecesPerCta + threadIdx.x;
  for (uint32_t first = begin; first < (blockIdx.x + 1) * kPiecesPerCta && first < total; first += kThreads * kBatch) {
    Piece piece[kBatch];
    char* to[kBatch];
    VD_UNROLL for (int k = 0; k < kBatch; ++k) {
      to[k] = nullptr;
      const uint32_t i = first + k * kThreads;
      if (i >= total) continue;
      char* const there = head_of(t, s, i / pieces) + i % pieces * step;
      char* const here = s.packed + int64_t(i) * sizeof(Piece);
      piece[k] = stream_piece(reinterpret_cast<const Piece*>(kPack ? there : here));
      to[k] = kPack ? here : there;
    }
    VD_UNROLL for (int k = 0; k < kBatch; ++k) {
      if (to[k] != nullptr) store_piece(reinterpret_cast<Piece*>(to[k]), piece[k]);
    }
  }
}

}  // namespace vdit::gpu::pack

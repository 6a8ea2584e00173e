// Pieces that move as they are: 16, 8, 4, 2 or 1 bytes, the widest that all addresses of a call allow.
#pragma once
#include "arch/arch.h"

namespace vdit::gpu {

template <class Piece>
VD_DEV Piece load_piece(const Piece* p) {
  if constexpr (sizeof(Piece) == 16)
    return arch::ldg128(p);
  else
    return *p;
}

// Read once and by nobody else, where nothing is written while the kernel runs: 16 bytes go past L1.
template <class Piece>
VD_DEV Piece stream_piece(const Piece* p) {
  if constexpr (sizeof(Piece) == 16)
    return arch::ldg128_stream(p);
  else
    return *p;
}

template <class Piece>
VD_DEV void store_piece(Piece* p, Piece piece) {
  if constexpr (sizeof(Piece) == 16)
    arch::stg128(p, piece);
  else
    *p = piece;
}

}  // namespace vdit::gpu

// Rows of [B, N, D] in pieces of 8 neighbouring elements, one per thread, and rows of tables. Tensors are fp32 or of
// the one 16-bit type H of the call, told apart by flags that are the same for the whole grid.
//
// `dim` is where the row ends, for pieces that are not whole; `aligned` says that the piece is whole and begins at a
// multiple of 16 bytes.
#pragma once
#include "arch/arch.h"
#include "kernels/fused/adaln.h"

namespace vdit::gpu::pieces {

constexpr int kPiece = 8;

// A piece in flight: fp32 takes both vectors, a 16-bit type the first.
struct Raw {
  uint4 v[2];
};

// stream: read once, so it does not displace what tables and weights keep in L1. stream_written: the same for memory
// that the thread itself writes to afterwards.
enum class Load { cached, stream, stream_written };

VD_DEV const void* element(const void* data, int64_t at, bool wide) {
  return static_cast<const char*>(data) + at * (wide ? 4 : 2);
}

template <Load kLoad>
VD_DEV Raw load(const void* row, bool wide, int piece, int dim, bool aligned) {
  Raw r{};
  if (aligned) {
    const auto* from = static_cast<const char*>(row) + int64_t(piece) * (wide ? 32 : 16);
    if constexpr (kLoad == Load::stream_written) {
      r.v[0] = arch::ldg128_stream_written(from);
      if (wide) r.v[1] = arch::ldg128_stream_written(from + 16);
    } else {
      constexpr bool kStream = kLoad == Load::stream;
      r.v[0] = kStream ? arch::ldg128_stream(from) : arch::ldg128(from);
      if (wide) r.v[1] = kStream ? arch::ldg128_stream(from + 16) : arch::ldg128(from + 16);
    }
    return r;
  }
  const int first = piece * kPiece;
  uint32_t word[kPiece] = {};
  if (wide) {
    const auto* from = static_cast<const uint32_t*>(row) + first;
    VD_UNROLL for (int e = 0; e < kPiece; ++e) {
      if (first + e < dim) word[e] = from[e];
    }
  } else {
    const auto* from = static_cast<const uint16_t*>(row) + first;
    VD_UNROLL for (int e = 0; e < kPiece; ++e) {
      if (first + e < dim) word[e / 2] |= uint32_t(from[e]) << (e % 2 * 16);
    }
  }
  r.v[0] = uint4{word[0], word[1], word[2], word[3]};
  r.v[1] = uint4{word[4], word[5], word[6], word[7]};
  return r;
}

template <class H>
VD_DEV void unpack(const Raw& r, bool wide, float (&out)[kPiece]) {
  const uint32_t word[kPiece] = {r.v[0].x, r.v[0].y, r.v[0].z, r.v[0].w, r.v[1].x, r.v[1].y, r.v[1].z, r.v[1].w};
  if (wide) {
    VD_UNROLL for (int e = 0; e < kPiece; ++e) out[e] = arch::as_float(word[e]);
  } else {
    VD_UNROLL for (int e = 0; e < kPiece; e += 2) arch::unpack<H>(word[e / 2], out[e], out[e + 1]);
  }
}

template <class H>
VD_DEV void load_floats(const void* row, bool wide, int piece, int dim, bool aligned, float (&out)[kPiece]) {
  unpack<H>(load<Load::cached>(row, wide, piece, dim, aligned), wide, out);
}

template <class H>
VD_DEV void store(void* row, bool wide, int piece, int dim, bool aligned, const float (&v)[kPiece]) {
  uint32_t word[kPiece];
  if (wide) {
    VD_UNROLL for (int e = 0; e < kPiece; ++e) word[e] = arch::as_uint(v[e]);
  } else {
    VD_UNROLL for (int e = 0; e < kPiece; e += 2) word[e / 2] = arch::pack<H>(v[e], v[e + 1]);
  }
  if (aligned) {
    auto* to = static_cast<char*>(row) + int64_t(piece) * (wide ? 32 : 16);
    arch::stg128(to, uint4{word[0], word[1], word[2], word[3]});
    if (wide) arch::stg128(to + 16, uint4{word[4], word[5], word[6], word[7]});
    return;
  }
  const int first = piece * kPiece;
  VD_UNROLL for (int e = 0; e < kPiece; ++e) {
    if (first + e >= dim) continue;
    if (wide)
      static_cast<uint32_t*>(row)[first + e] = word[e];
    else
      static_cast<uint16_t*>(row)[first + e] = uint16_t(word[e / 2] >> (e % 2 * 16));
  }
}

// To the nearest value of H, where `on`, which is the same for the whole grid.
template <class H>
VD_DEV void round_to(float (&v)[kPiece], bool on) {
  if (!on) return;
  VD_UNROLL for (int e = 0; e < kPiece; e += 2) arch::unpack<H>(arch::pack<H>(v[e], v[e + 1]), v[e], v[e + 1]);
}

// The piece of a table's row, with the base added.
template <class H, class Params>
VD_DEV void table_piece(const Params& p, const AdaLNTable& t, const void* row, int piece, int dim, bool aligned,
                        float (&v)[kPiece]) {
  load_floats<H>(row, p.row_dtype == DType::f32, piece, dim, aligned, v);
  if (t.base == nullptr) return;
  float base[kPiece];
  load_floats<H>(t.base, p.base_dtype == DType::f32, piece, dim, aligned, base);
  VD_UNROLL for (int e = 0; e < kPiece; ++e) v[e] += base[e];
  round_to<H>(v, t.round);
}

template <class Params>
VD_DEV const void* row_of(const Params& p, const AdaLNTable& t, int64_t b, int64_t n) {
  if (t.data == nullptr) return nullptr;
  int64_t row = 0;
  if (t.rows > 1) {
    row = p.index == nullptr ? n : p.index[b * p.index_batch_stride + n * p.index_stride];
    row = row >= 0 && row < t.rows ? row : t.rows - 1;  // indices come from the device: nothing outside is read
  }
  return element(t.data, b * t.batch_stride + row * t.row_stride, p.row_dtype == DType::f32);
}

// On the host: whether every row is made of whole 16-byte pieces. Strides that nobody steps by do not count.
inline bool aligned(const void* data, DType dtype, int64_t stride_a = 0, int64_t stride_b = 0) {
  const int64_t elements = dtype == DType::f32 ? 4 : 8;
  return data == nullptr ||
         (reinterpret_cast<uintptr_t>(data) % 16 == 0 && (stride_a % elements | stride_b % elements) == 0);
}

template <class Params>
bool aligned(const Params& p, const AdaLNRows& x) {
  return aligned(x.data, x.dtype, p.batch > 1 ? x.batch_stride : 0, p.tokens > 1 ? x.token_stride : 0);
}

template <class Params>
bool aligned(const Params& p, const AdaLNTable& t) {
  return aligned(t.data, p.row_dtype, p.batch > 1 ? t.batch_stride : 0, t.rows > 1 ? t.row_stride : 0) &&
         aligned(t.base, p.base_dtype);
}

}  // namespace vdit::gpu::pieces

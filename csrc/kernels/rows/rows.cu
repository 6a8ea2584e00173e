// Some rows of a sequence taken out, and put back. A CTA moves the rows of a few neighbouring slots of one tensor: the
// row list is read once into shared memory, rows move in the widest pieces that all addresses allow, kBatch of them in
// flight per thread. Several tensors with one list are one launch.
#include "kernels/rows/rows.h"

#include "arch/arch.h"
#include "kernels/piece.h"

namespace vdit {
namespace gpu::rows {

constexpr int kThreads = 256, kMaxSlots = 64, kBatch = 4;
constexpr int64_t kBytesPerCta = 32 << 10;
constexpr uint32_t kNone = ~0u;

// What a CTA works on.
struct Place {
  int64_t pair, batch, slot;  // slot: the first
  int32_t slots;
};

VD_DEV Place place_of(const RowsParams& p, int32_t slots_per_cta) {
  const int64_t tiles = (int64_t(p.slots) + slots_per_cta - 1) / slots_per_cta;
  Place at;
  at.slot = blockIdx.x % tiles * slots_per_cta;
  at.batch = blockIdx.x / tiles % p.batch;
  at.pair = blockIdx.x / tiles / p.batch;
  at.slots = int32_t(p.slots - at.slot < slots_per_cta ? p.slots - at.slot : slots_per_cta);
  return at;
}

// The rows of the CTA's slots to shared memory, kNone for those that do not count.
VD_DEV void read_list(const RowsParams& p, const Place& at, uint32_t ids) {
  if (int(threadIdx.x) < at.slots) {
    const int64_t slot = at.slot + threadIdx.x;
    const int64_t used = p.count != nullptr ? p.count[at.batch * p.count_batch] : p.slots;
    const int32_t row = p.rows[at.batch * p.rows_batch + slot * p.rows_slot];
    const bool valid = slot < used && row >= 0 && row < p.tokens;
    arch::sts32(ids + threadIdx.x * 4, valid ? uint32_t(row) : kNone);
  }
  arch::syncthreads();
}

template <class Piece, bool kGather>
VD_KERNEL(kThreads, 1)
move_rows(const VD_GRID_CONST RowsParams p, int32_t slots_per_cta) {
  VD_SHARED(uint32_t, list, kMaxSlots);
  const uint32_t ids = arch::smem_u32(list);
  const Place at = place_of(p, slots_per_cta);
  read_list(p, at, ids);
  const RowPair& t = p.pair[at.pair];
  char* full = static_cast<char*>(t.full) + at.batch * t.full_batch;
  char* part = static_cast<char*>(t.part) + at.batch * t.part_batch + at.slot * t.part_row;
  const int32_t pieces = int32_t(t.row_bytes / int64_t(sizeof(Piece))), total = at.slots * pieces;
  for (int32_t first = threadIdx.x; first < total; first += kThreads * kBatch) {
    Piece piece[kBatch];
    char* to[kBatch];
    VD_UNROLL for (int k = 0; k < kBatch; ++k) {
      to[k] = nullptr;
      const int32_t i = first + k * kThreads;
      if (i >= total) continue;
      const int32_t slot = i / pieces, column = i - slot * pieces;
      const uint32_t row = arch::lds32(ids + slot * 4);
      char* const there = full + int64_t(row) * t.full_row + int64_t(column) * sizeof(Piece);
      char* const here = part + slot * t.part_row + int64_t(column) * sizeof(Piece);
      piece[k] = Piece{};
      if (row != kNone) piece[k] = stream_piece(reinterpret_cast<const Piece*>(kGather ? there : here));
      if (kGather || row != kNone) to[k] = kGather ? here : there;
    }
    VD_UNROLL for (int k = 0; k < kBatch; ++k) {
      if (to[k] != nullptr) store_piece(reinterpret_cast<Piece*>(to[k]), piece[k]);
    }
  }
}

// W neighbouring elements: 16 bytes, or one.
template <class T, int W>
VD_DEV void load_floats(const char* p, float (&v)[W]) {
  if constexpr (sizeof(T) == 4 && W > 1) {
    VD_UNROLL for (int e = 0; e < W; e += 4) {
      const uint4 u = arch::ldg128(p + e * 4);
      v[e] = arch::as_float(u.x), v[e + 1] = arch::as_float(u.y);
      v[e + 2] = arch::as_float(u.z), v[e + 3] = arch::as_float(u.w);
    }
  } else if constexpr (sizeof(T) == 4) {
    v[0] = *reinterpret_cast<const float*>(p);
  } else if constexpr (W > 1) {
    const uint4 u = arch::ldg128(p);
    const uint32_t word[4] = {u.x, u.y, u.z, u.w};
    VD_UNROLL for (int e = 0; e < W; e += 2) arch::unpack<typename T::Half>(word[e / 2], v[e], v[e + 1]);
  } else {
    float rest;
    arch::unpack<typename T::Half>(*reinterpret_cast<const uint16_t*>(p), v[0], rest);
  }
}

template <class T, int W>
VD_DEV void store_floats(char* p, const float (&v)[W]) {
  if constexpr (sizeof(T) == 4 && W > 1) {
    arch::stg128(p, uint4{arch::as_uint(v[0]), arch::as_uint(v[1]), arch::as_uint(v[2]), arch::as_uint(v[3])});
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float*>(p) = v[0];
  } else if constexpr (W > 1) {
    uint32_t word[4];
    VD_UNROLL for (int e = 0; e < W; e += 2) word[e / 2] = arch::pack<typename T::Half>(v[e], v[e + 1]);
    arch::stg128(p, uint4{word[0], word[1], word[2], word[3]});
  } else {
    *reinterpret_cast<uint16_t*>(p) = uint16_t(arch::pack<typename T::Half>(v[0], 0.f));
  }
}

struct F32 {
  uint32_t bits;
};
struct BF16 {
  using Half = arch::BF16;
  uint16_t bits;
};
struct F16 {
  using Half = arch::F16;
  uint16_t bits;
};

// The factors of W channels of a slot.
template <class T, int W>
VD_DEV void load_gate(const RowGate& gate, int64_t batch, int64_t slot, int64_t channel, float (&v)[W]) {
  const int64_t at = batch * gate.batch + slot * gate.slot + channel * gate.channel;
  const bool wide = gate.dtype == DType::f32;
  const char* p = static_cast<const char*>(gate.data) + at * (wide ? 4 : int64_t(sizeof(T)));
  if (gate.channel == 0) {
    float one[1];
    if (wide)
      load_floats<F32>(p, one);
    else
      load_floats<T>(p, one);
    VD_UNROLL for (int e = 0; e < W; ++e) v[e] = one[0];
  } else if (wide) {
    load_floats<F32>(p, v);
  } else {
    load_floats<T>(p, v);
  }
}

template <class T, int W>
VD_KERNEL(kThreads, 1)
blend_rows(const VD_GRID_CONST RowsParams p, int32_t slots_per_cta) {
  VD_SHARED(uint32_t, list, kMaxSlots);
  const uint32_t ids = arch::smem_u32(list);
  const Place at = place_of(p, slots_per_cta);
  read_list(p, at, ids);
  const RowPair& t = p.pair[at.pair];
  constexpr int kPiece = W * int(sizeof(T));
  char* full = static_cast<char*>(t.full) + at.batch * t.full_batch;
  const char* part = static_cast<const char*>(t.part) + at.batch * t.part_batch + at.slot * t.part_row;
  const int32_t pieces = int32_t(t.row_bytes / kPiece), total = at.slots * pieces;
  for (int32_t i = threadIdx.x; i < total; i += kThreads) {
    const int32_t slot = i / pieces, column = i - slot * pieces;
    const uint32_t row = arch::lds32(ids + slot * 4);
    if (row == kNone) continue;
    char* const to = full + int64_t(row) * t.full_row + int64_t(column) * kPiece;
    float y[W], x[W] = {}, gate[W];
    load_floats<T>(part + slot * t.part_row + int64_t(column) * kPiece, y);
    if (p.add != 0) load_floats<T>(to, x);
    if (p.gate.data != nullptr) {
      load_gate<T>(p.gate, at.batch, at.slot + slot, int64_t(column) * W, gate);
      VD_UNROLL for (int e = 0; e < W; ++e) x[e] += gate[e] * y[e];
    } else {
      VD_UNROLL for (int e = 0; e < W; ++e) x[e] += y[e];
    }
    store_floats<T>(to, x);
  }
}

// Bytes that divide the address of every row of every tensor.
uint64_t alignment(const RowsParams& p) {
  uint64_t all = 0;
  for (int i = 0; i < p.pairs; ++i) {
    const RowPair& t = p.pair[i];
    all |= reinterpret_cast<uintptr_t>(t.full) | reinterpret_cast<uintptr_t>(t.part) | uint64_t(t.row_bytes);
    if (p.batch > 1) all |= uint64_t(t.full_batch) | uint64_t(t.part_batch);
    if (p.tokens > 1) all |= uint64_t(t.full_row);
    if (p.slots > 1) all |= uint64_t(t.part_row);
  }
  return all;
}

// Whether W factors of a gate per channel can be loaded in pieces of 16 bytes.
bool gate_is_aligned(const RowsParams& p) {
  if (p.gate.data == nullptr || p.gate.channel == 0) return true;
  const int64_t size = p.gate.dtype == DType::f32 ? 4 : 2;
  return ((reinterpret_cast<uintptr_t>(p.gate.data) | uint64_t(p.gate.batch * size) | uint64_t(p.gate.slot * size)) &
          15) == 0;
}

template <class Launch>
int over_grid(const RowsParams& p, Launch launch) {
  int64_t widest = 1;
  for (int i = 0; i < p.pairs; ++i) widest = p.pair[i].row_bytes > widest ? p.pair[i].row_bytes : widest;
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  if (widest > (int64_t(1) << 24)) return kInvalid;
  int64_t slots = kBytesPerCta / widest;
  slots = slots < 1 ? 1 : slots > kMaxSlots ? kMaxSlots : slots;
  const int64_t blocks = (int64_t(p.slots) + slots - 1) / slots * p.batch * p.pairs;
  if (blocks == 0) return 0;
  return blocks > INT32_MAX ? kInvalid : launch(dim3(unsigned(blocks)), int32_t(slots));
}

template <class Piece, bool kGather>
int launch_move(const RowsParams& p, arch::stream_t stream) {
  return over_grid(p, [&](dim3 grid, int32_t slots) {
    return arch::launch(move_rows<Piece, kGather>, grid, dim3(kThreads), 0, stream, p, slots);
  });
}

template <bool kGather>
int move(const RowsParams& p, void* stream) {
  const auto s = static_cast<arch::stream_t>(stream);
  const uint64_t all = alignment(p);
  if (all % 16 == 0) return launch_move<uint4, kGather>(p, s);
  if (all % 4 == 0) return launch_move<uint32_t, kGather>(p, s);
  if (all % 2 == 0) return launch_move<uint16_t, kGather>(p, s);
  return launch_move<uint8_t, kGather>(p, s);
}

template <class T, int W>
int launch_blend(const RowsParams& p, arch::stream_t stream) {
  return over_grid(p, [&](dim3 grid, int32_t slots) {
    return arch::launch(blend_rows<T, W>, grid, dim3(kThreads), 0, stream, p, slots);
  });
}

template <class T>
int blend(const RowsParams& p, void* stream) {
  const auto s = static_cast<arch::stream_t>(stream);
  if (alignment(p) % 16 == 0 && gate_is_aligned(p)) return launch_blend<T, 16 / int(sizeof(T))>(p, s);
  return launch_blend<T, 1>(p, s);
}

}  // namespace gpu::rows

int cuda_gather_rows(const RowsParams& p, void* stream) { return gpu::rows::move<true>(p, stream); }

int cuda_scatter_rows(const RowsParams& p, void* stream) {
  if (p.add == 0 && p.gate.data == nullptr) return gpu::rows::move<false>(p, stream);
  switch (p.dtype) {
    case DType::f32: return gpu::rows::blend<gpu::rows::F32>(p, stream);
    case DType::f16: return gpu::rows::blend<gpu::rows::F16>(p, stream);
    case DType::bf16: return gpu::rows::blend<gpu::rows::BF16>(p, stream);
  }
  return 1;
}

}  // namespace vdit

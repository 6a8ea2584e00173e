// Rows added up by weight on GPUs: a warp per row of the result, the loads of a piece of all its operands in flight
// together. Slots and weights of a row are few and read by every lane.
#include "kernels/fused/combine_rows.h"

#include "arch/arch.h"

namespace vdit::gpu {
namespace combine {

constexpr int kWarps = 8, kThreads = 32 * kWarps;

// 16 bytes of a row as fp32, and one element.
template <class E>
struct Element {
  using Bits = uint16_t;
  static constexpr int kBytes = 2, kPiece = 8;
  VD_STATIC_METHOD void widen(const uint4& bits, float (&v)[kPiece]) {
    arch::unpack<E>(bits.x, v[0], v[1]);
    arch::unpack<E>(bits.y, v[2], v[3]);
    arch::unpack<E>(bits.z, v[4], v[5]);
    arch::unpack<E>(bits.w, v[6], v[7]);
  }
  VD_STATIC_METHOD uint4 narrow(const float (&v)[kPiece]) {
    return {arch::pack<E>(v[0], v[1]), arch::pack<E>(v[2], v[3]), arch::pack<E>(v[4], v[5]), arch::pack<E>(v[6], v[7])};
  }
  VD_STATIC_METHOD float load(const void* row, int column) {
    float lo, hi;
    arch::unpack<E>(static_cast<const uint16_t*>(row)[column], lo, hi);
    return lo;
  }
  VD_STATIC_METHOD void store(void* row, int column, float v) {
    static_cast<uint16_t*>(row)[column] = uint16_t(arch::pack<E>(v, v));
  }
};
template <>
struct Element<float> {
  using Bits = uint32_t;
  static constexpr int kBytes = 4, kPiece = 4;
  VD_STATIC_METHOD void widen(const uint4& bits, float (&v)[kPiece]) {
    v[0] = arch::as_float(bits.x), v[1] = arch::as_float(bits.y);
    v[2] = arch::as_float(bits.z), v[3] = arch::as_float(bits.w);
  }
  VD_STATIC_METHOD uint4 narrow(const float (&v)[kPiece]) {
    return {arch::as_uint(v[0]), arch::as_uint(v[1]), arch::as_uint(v[2]), arch::as_uint(v[3])};
  }
  VD_STATIC_METHOD float load(const void* row, int column) { return static_cast<const float*>(row)[column]; }
  VD_STATIC_METHOD void store(void* row, int column, float v) { static_cast<float*>(row)[column] = v; }
};

// The operands of one row of the result; null where there is none.
template <class E, int kSlots>
struct Operands {
  const char *source[kSlots], *base, *residual, *gate;
  float weight[kSlots];
  bool any;  // the branch is not empty

  VD_METHOD Operands(const CombineRowsParams& p, int64_t row) {
    constexpr int kBytes = Element<E>::kBytes;
    base = row_of(p.base, row * p.base_stride * kBytes);
    residual = row_of(p.residual, row * p.residual_stride * kBytes);
    gate = row_of(p.gate, row / p.rows_per_gate * p.gate_stride * kBytes);
    any = base != nullptr;
    VD_UNROLL for (int j = 0; j < kSlots; ++j) {
      source[j] = nullptr;
      weight[j] = 1.f;
      if (j >= p.slots_per_row) continue;
      const int64_t slot = p.slots[row * p.slots_per_row + j];
      if (slot < 0 || slot >= p.sources) continue;
      source[j] = row_of(p.source, slot * p.source_stride * kBytes);
      if (p.weights != nullptr) weight[j] = p.weights[row * p.slots_per_row + j];
      any = true;
    }
  }
  VD_STATIC_METHOD const char* row_of(const void* data, int64_t bytes) {
    return data == nullptr ? nullptr : static_cast<const char*>(data) + bytes;
  }
};

template <class E, int kSlots>
VD_DEV void combine_pieces(const CombineRowsParams& p, const Operands<E, kSlots>& row, char* out, int lane) {
  using Type = Element<E>;
  constexpr int kPiece = Type::kPiece;
  const int pieces = p.dim / kPiece;
  for (int piece = lane; piece < pieces; piece += 32) {
    const int at = piece * 16;
    uint4 raw[kSlots], raw_base{}, raw_residual{}, raw_gate{};
    VD_UNROLL for (int j = 0; j < kSlots; ++j) {
      raw[j] = uint4{};
      if (row.source[j] != nullptr) raw[j] = arch::ldg128_stream(row.source[j] + at);
    }
    if (row.base != nullptr) raw_base = arch::ldg128_stream(row.base + at);
    if (row.residual != nullptr) raw_residual = arch::ldg128_stream(row.residual + at);
    if (row.gate != nullptr && row.any) raw_gate = arch::ldg128(row.gate + at);
    uint4 result = raw_residual;
    if (row.any) {
      float sum[kPiece], v[kPiece];
      Type::widen(raw_base, sum);
      VD_UNROLL for (int j = 0; j < kSlots; ++j) {
        if (row.source[j] == nullptr) continue;
        Type::widen(raw[j], v);
        VD_UNROLL for (int e = 0; e < kPiece; ++e) sum[e] += row.weight[j] * v[e];
      }
      if (row.gate != nullptr) {
        Type::widen(raw_gate, v);
        VD_UNROLL for (int e = 0; e < kPiece; ++e) sum[e] *= v[e];
      }
      if (row.residual != nullptr) {
        Type::widen(raw_residual, v);
        VD_UNROLL for (int e = 0; e < kPiece; ++e) sum[e] += v[e];
      }
      result = Type::narrow(sum);
    }
    arch::stg128(out + at, result);
  }
}

template <class E, int kSlots>
VD_DEV void combine_elements(const CombineRowsParams& p, const Operands<E, kSlots>& row, char* out, int lane) {
  using Type = Element<E>;
  using Bits = typename Type::Bits;
  for (int column = lane; column < p.dim; column += 32) {
    if (!row.any) {
      const auto* residual = reinterpret_cast<const Bits*>(row.residual);
      reinterpret_cast<Bits*>(out)[column] = residual != nullptr ? residual[column] : Bits{};
      continue;
    }
    float sum = row.base != nullptr ? Type::load(row.base, column) : 0.f;
    VD_UNROLL for (int j = 0; j < kSlots; ++j) {
      if (row.source[j] != nullptr) sum += row.weight[j] * Type::load(row.source[j], column);
    }
    if (row.gate != nullptr) sum *= Type::load(row.gate, column);
    if (row.residual != nullptr) sum += Type::load(row.residual, column);
    Type::store(out, column, sum);
  }
}

template <class E, int kSlots, bool kVector>
VD_KERNEL(kThreads, 2)
combine_rows(const VD_GRID_CONST CombineRowsParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t at = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= p.rows) return;
  const Operands<E, kSlots> row(p, at);
  char* out = static_cast<char*>(p.out) + at * p.dim * Element<E>::kBytes;
  if constexpr (kVector)
    combine_pieces<E, kSlots>(p, row, out, lane);
  else
    combine_elements<E, kSlots>(p, row, out, lane);
}

// Whether every row of every tensor is made of whole pieces of 16 bytes.
bool whole_pieces(const CombineRowsParams& p, int64_t bytes) {
  uint64_t all = uint64_t(p.dim * bytes) | reinterpret_cast<uintptr_t>(p.out);
  const auto add = [&](const void* data, int64_t stride, bool many) {
    if (data != nullptr) all |= reinterpret_cast<uintptr_t>(data) | uint64_t(many ? stride * bytes : 0);
  };
  add(p.source, p.source_stride, p.sources > 1);
  add(p.base, p.base_stride, p.rows > 1);
  add(p.residual, p.residual_stride, p.rows > 1);
  add(p.gate, p.gate_stride, p.rows > p.rows_per_gate);
  return all % 16 == 0;
}

template <class E, int kSlots>
int launch(const CombineRowsParams& p, arch::stream_t stream) {
  const dim3 grid(unsigned((p.rows + kWarps - 1) / kWarps)), threads(kThreads);
  if (whole_pieces(p, Element<E>::kBytes))
    return arch::launch(combine_rows<E, kSlots, true>, grid, threads, 0, stream, p);
  return arch::launch(combine_rows<E, kSlots, false>, grid, threads, 0, stream, p);
}

template <class E>
int launch(const CombineRowsParams& p, arch::stream_t stream) {
  if (p.slots_per_row <= 1) return launch<E, 1>(p, stream);
  if (p.slots_per_row <= 2) return launch<E, 2>(p, stream);
  if (p.slots_per_row <= 4) return launch<E, 4>(p, stream);
  return launch<E, kCombineMaxSlots>(p, stream);
}

}  // namespace combine
}  // namespace vdit::gpu

namespace vdit {

int cuda_combine_rows(const CombineRowsParams& p, void* stream) {
  using namespace gpu::combine;
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  if (p.rows < 0 || p.rows > int64_t{INT32_MAX} * kWarps || p.slots_per_row < 1 || p.rows_per_gate < 1 ||
      p.slots_per_row > kCombineMaxSlots)
    return kInvalid;
  if (p.rows == 0 || p.dim == 0) return 0;
  const auto s = static_cast<arch::stream_t>(stream);
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, s);
    case DType::f16: return launch<arch::F16>(p, s);
    case DType::bf16: return launch<arch::BF16>(p, s);
  }
  return kInvalid;
}

}  // namespace vdit

// The host entries of pack_slices and unpack_slices: how wide pieces may be, and the grid.
#include "kernels/pack/compress.h"
#include "kernels/pack/move.h"
#include "kernels/pack/pack.h"

namespace vdit {
namespace gpu::pack {

// Bytes that divide the address of every head of every tensor, and of the buffer; offsets there are sums of whole heads
// or multiples of kPackAlign.
uint64_t alignment(const PackParams& p) {
  uint64_t all = reinterpret_cast<uintptr_t>(p.buffer);
  for (int32_t i = 0; i < p.tensors; ++i) {
    const PackTensor& t = p.tensor[i];
    all |= reinterpret_cast<uintptr_t>(t.data);
    if (p.batch > 1) all |= uint64_t(t.batch);
    if (t.rows > 1) all |= uint64_t(t.row);
    if (t.heads > 1) all |= uint64_t(t.head);
  }
  return all;
}

// launch(grid): a CTA per `per_cta` units of each slice, `units(tensor)` of them per head. Nothing to do is fine.
template <class Units, class Launch>
int over_slices(const PackParams& p, int64_t per_cta, Units units, Launch launch) {
  int64_t most = 0;
  for (int32_t i = 0; i < p.tensors; ++i) {
    for (int32_t s = 0; s < p.slices; ++s) {
      const PackSlice slice = pack_slice(p, i, s);
      const int64_t count = int64_t(p.batch) * slice.rows * slice.heads * units(p.tensor[i]);
      most = count > most ? count : most;
    }
  }
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  if (most > INT32_MAX - per_cta) return kInvalid;
  if (most == 0) return 0;
  return launch(dim3(unsigned((most + per_cta - 1) / per_cta), unsigned(p.tensors * p.slices)));
}

template <class Piece, bool kPack>
int move(const PackParams& p, arch::stream_t stream) {
  const auto units = [&](const PackTensor& t) { return int64_t(t.dim) * p.element / int64_t(sizeof(Piece)); };
  return over_slices(p, kPiecesPerCta, units, [&](dim3 grid) {
    return arch::launch(move_slices<Piece, kPack>, grid, dim3(kThreads), 0, stream, p);
  });
}

template <bool kPack>
int move_plain(const PackParams& p, arch::stream_t stream) {
  uint64_t all = alignment(p);
  for (int32_t i = 0; i < p.tensors; ++i) {
    const PackTensor& t = p.tensor[i];
    all |= uint64_t(t.channel == p.element ? int64_t(t.dim) * p.element : p.element);
    if (t.channel != p.element) all |= uint64_t(t.channel);
  }
  if (all % 16 == 0) return move<uint4, kPack>(p, stream);
  if (all % 8 == 0) return move<uint2, kPack>(p, stream);
  if (all % 4 == 0) return move<uint32_t, kPack>(p, stream);
  if (all % 2 == 0) return move<uint16_t, kPack>(p, stream);
  return move<uint8_t, kPack>(p, stream);
}

template <class Kernel>
int compress(const PackParams& p, Kernel* kernel, arch::stream_t stream) {
  const int32_t block = p.format == PackFormat::e4m3 ? p.block : pieces::kPiece;
  int32_t aligned = alignment(p) % 16 == 0 ? 1 : 0;
  for (int32_t i = 0; i < p.tensors; ++i) {
    if (p.tensor[i].dim % pieces::kPiece != 0) aligned = 0;
  }
  const auto units = [&](const PackTensor& t) { return (int64_t(t.dim) + block - 1) / block; };
  return over_slices(p, kRounds * int64_t(kThreads) * pieces::kPiece / block, units,
                     [&](dim3 grid) { return arch::launch(kernel, grid, dim3(kThreads), 0, stream, p, aligned); });
}

template <bool kPack, class H, bool kE4m3>
int with_type(const PackParams& p, arch::stream_t stream) {
  if constexpr (kPack) return compress(p, compress_slices<H, kE4m3>, stream);
  return compress(p, expand_slices<H, kE4m3>, stream);
}

template <bool kPack>
int run(const PackParams& p, void* stream) {
  const auto s = static_cast<arch::stream_t>(stream);
  const bool half = p.dtype == DType::f16;
  switch (p.format) {
    case PackFormat::plain: return move_plain<kPack>(p, s);
    case PackFormat::bf16:
      return half ? with_type<kPack, arch::F16, false>(p, s) : with_type<kPack, arch::BF16, false>(p, s);
    case PackFormat::e4m3:
      return half ? with_type<kPack, arch::F16, true>(p, s) : with_type<kPack, arch::BF16, true>(p, s);
  }
  return 1;
}

}  // namespace gpu::pack

int cuda_pack_slices(const PackParams& p, void* stream) { return gpu::pack::run<true>(p, stream); }
int cuda_unpack_slices(const PackParams& p, void* stream) { return gpu::pack::run<false>(p, stream); }

}  // namespace vdit

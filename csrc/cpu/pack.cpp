#include "cpu/pack.h"

#include <cstring>

#include "cpu/features.h"

namespace vdit_generic {
void compress_head(const vdit::PackHead& h);
void expand_head(const vdit::PackHead& h);
}  // namespace vdit_generic
#if defined(VDIT_X86)
namespace vdit_avx2 {
void compress_head(const vdit::PackHead& h);
void expand_head(const vdit::PackHead& h);
}  // namespace vdit_avx2
namespace vdit_avx512 {
void compress_head(const vdit::PackHead& h);
void expand_head(const vdit::PackHead& h);
}  // namespace vdit_avx512
#endif

namespace vdit {
namespace {

template <bool kPack>
void copy(char* tensor, char* packed, int64_t bytes) {
  std::memcpy(kPack ? packed : tensor, kPack ? tensor : packed, static_cast<size_t>(bytes));
}

// Channels that lie apart.
template <bool kPack>
void copy_apart(char* tensor, char* packed, const PackTensor& t, int32_t element) {
  for (int32_t d = 0; d < t.dim; ++d) {
    // Constant sizes become single moves.
    char *there = tensor + d * t.channel, *here = packed + int64_t{d} * element;
    switch (element) {
      case 2: copy<kPack>(there, here, 2); break;
      case 4: copy<kPack>(there, here, 4); break;
      default: copy<kPack>(there, here, element);
    }
  }
}

// Calls visit(row of the tensor, number of the row's first head in the slice) for rows [first, last).
template <class Visit>
void for_rows(const PackTensor& t, const PackSlice& s, int64_t first, int64_t last, Visit visit) {
  for (int64_t i = first; i < last; ++i) visit(s.data + i / s.rows * t.batch + i % s.rows * t.row, i * s.heads);
}

template <bool kPack>
void move_rows(const PackParams& p, const PackTensor& t, const PackSlice& s, int64_t first, int64_t last) {
  const int64_t bytes = int64_t{t.dim} * p.element;
  const bool dense = t.channel == p.element || t.dim <= 1;
  const bool whole = dense && (t.head == bytes || s.heads == 1);
  for_rows(t, s, first, last, [&](char* row, int64_t head) {
    char* packed = s.packed + head * bytes;
    if (whole) return copy<kPack>(row, packed, s.heads * bytes);
    for (int32_t h = 0; h < s.heads; ++h, row += t.head, packed += bytes) {
      if (dense) {
        copy<kPack>(row, packed, bytes);
      } else {
        copy_apart<kPack>(row, packed, t, p.element);
      }
    }
  });
}

template <class Run>
void code_rows(const PackParams& p, const PackTensor& t, const PackSlice& s, int64_t first, int64_t last, Run run) {
  const bool coded = p.format == PackFormat::e4m3;
  const int64_t codes = int64_t{p.batch} * s.rows * s.heads * t.dim, size = coded ? 1 : 2;
  const int64_t blocks = coded ? (t.dim + p.block - 1) / p.block : 0;
  auto* scales = reinterpret_cast<uint8_t*>(s.packed + pack_aligned(codes));
  for_rows(t, s, first, last, [&](char* row, int64_t head) {
    for (int32_t h = 0; h < s.heads; ++h, ++head, row += t.head) {
      run({p.dtype, p.format, row, s.packed + head * t.dim * size, scales + head * blocks, t.dim, p.block});
    }
  });
}

void clear_ends(const PackParams& p, const PackTensor& t, const PackSlice& s) {
  const int64_t heads = int64_t{p.batch} * s.rows * s.heads, codes = heads * t.dim;
  const int64_t scales = heads * ((t.dim + p.block - 1) / p.block);
  std::memset(s.packed + codes, 0, static_cast<size_t>(pack_aligned(codes) - codes));
  std::memset(s.packed + pack_aligned(codes) + scales, 0, static_cast<size_t>(pack_aligned(scales) - scales));
}

}  // namespace

void cpu_pack_rows(const PackParams& p, int32_t tensor, int32_t slice, int64_t first, int64_t last) {
  const PackTensor& t = p.tensor[tensor];
  const PackSlice s = pack_slice(p, tensor, slice);
  if (p.format == PackFormat::plain) return move_rows<true>(p, t, s, first, last);
  if (p.format == PackFormat::e4m3 && first == 0) clear_ends(p, t, s);
  code_rows(p, t, s, first, last, cpu_compress_head);
}

void cpu_unpack_rows(const PackParams& p, int32_t tensor, int32_t slice, int64_t first, int64_t last) {
  const PackTensor& t = p.tensor[tensor];
  const PackSlice s = pack_slice(p, tensor, slice);
  if (p.format == PackFormat::plain) return move_rows<false>(p, t, s, first, last);
  code_rows(p, t, s, first, last, cpu_expand_head);
}

void cpu_compress_head(const PackHead& h) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::compress_head(h);
    case Isa::avx2: return vdit_avx2::compress_head(h);
#endif
    default: return vdit_generic::compress_head(h);
  }
}

void cpu_expand_head(const PackHead& h) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::expand_head(h);
    case Isa::avx2: return vdit_avx2::expand_head(h);
#endif
    default: return vdit_generic::expand_head(h);
  }
}

}  // namespace vdit

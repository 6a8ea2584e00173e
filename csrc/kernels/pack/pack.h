// Slices of tensors one behind the other in a buffer, and back: the arguments of pack_slices and unpack_slices.
#pragma once
#include <cstdint>

#include "kernels/types.h"

namespace vdit {

constexpr int kPackMaxTensors = 4, kPackMaxSlices = 64;

// plain: bytes as they are. bf16: rounded. e4m3: the codes of a slice, one byte each, then the biased exponents of the
// powers of two that blocks of channels share, both continued with zeros to kPackAlign bytes.
enum class PackFormat : int32_t { plain = 0, bf16 = 1, e4m3 = 2 };
constexpr int64_t kPackAlign = 16;
constexpr int64_t pack_aligned(int64_t bytes) { return (bytes + kPackAlign - 1) / kPackAlign * kPackAlign; }

// [B, N, H, D], strides in bytes; channels are contiguous unless the format is plain.
struct PackTensor {
  char* data;
  int64_t batch, row, head, channel;
  int32_t rows, heads, dim;
  int32_t start[kPackMaxSlices + 1];  // of the slices along the dimension that is cut, and its end
  int64_t offset[kPackMaxSlices];     // of the slices in the buffer, bytes
};

struct PackParams {
  PackTensor tensor[kPackMaxTensors];  // fewer than 2^31 elements each
  char* buffer;
  int32_t tensors, slices, batch;
  int32_t cut_heads;  // the dimension that is cut: 1 heads, 0 rows
  int32_t element;    // bytes of one, 1, 2, 4, 8 or 16
  DType dtype;        // unless the format is plain
  PackFormat format;
  int32_t block;  // channels that share a power of two: 32, 64 or 128
};

// A slice of a tensor: [B, rows, heads, D] from `data`, and where it lies in the buffer.
struct PackSlice {
  char* data;
  char* packed;
  int32_t rows, heads;
};
constexpr PackSlice pack_slice(const PackParams& p, int32_t tensor, int32_t slice) {
  const PackTensor& t = p.tensor[tensor];
  const int32_t first = t.start[slice], count = t.start[slice + 1] - first;
  return {t.data + first * (p.cut_heads != 0 ? t.head : t.row), p.buffer + t.offset[slice],
          p.cut_heads != 0 ? t.rows : count, p.cut_heads != 0 ? count : t.heads};
}

// CUDA: launch on `stream` (a cudaStream_t); return 0 or a cudaError_t.
int cuda_pack_slices(const PackParams& params, void* stream);    // reads the tensors, writes the buffer
int cuda_unpack_slices(const PackParams& params, void* stream);  // reads the buffer, writes the tensors

}  // namespace vdit

// The rows of linear attention: which kernel, and in how many parts.
#include "kernels/linear/plain.h"

namespace vdit::gpu::linear {

bool on_tensor_cores(const LinearReadoutParams& p) {
  return matrix_dims(p.dtype, p.dim, p.dim_v) && (p.map != FeatureMap::hedgehog || p.q_den.data == nullptr) &&
         rows_aligned(p.q, p.batch, p.length, p.heads) &&
         (p.q_den.data == nullptr || rows_aligned(p.q_den, p.batch, p.length, p.heads));
}

template <class T>
int launch_matrix(const ReadoutArgs& a, arch::stream_t stream) {
  const bool small = a.p.dim <= 64 && a.p.dim_v <= 64;
  if (a.p.map == FeatureMap::hedgehog)
    return small ? launch_readout_matrix<T, 64, true>(a, stream) : launch_readout_matrix<T, 128, true>(a, stream);
  return small ? launch_readout_matrix<T, 64, false>(a, stream) : launch_readout_matrix<T, 128, false>(a, stream);
}

}  // namespace vdit::gpu::linear

namespace vdit {

int cuda_linear_readout(const LinearReadoutParams& p, int32_t processors, void* stream) {
  using namespace gpu::linear;
  if (p.dim < 1 || p.dim > kLinearMaxDim || p.dim_v < 1 || p.dim_v > kLinearMaxDim || p.kv_heads < 1 ||
      p.heads % p.kv_heads != 0 || processors < 1)
    return kInvalid;
  const int64_t sequences = int64_t{p.batch} * p.heads;
  if (sequences == 0 || p.length == 0) return 0;
  const bool matrix = on_tensor_cores(p), small = p.dim <= 64 && p.dim_v <= 64;
  static_assert(plain::kTokens == 16);  // tiles of both kernels
  const auto tiles = int32_t((int64_t{p.length} + 15) / 16);
  // A block of the tensor-core kernels takes a tile per warp at a time, and brings the state first: about the work
  // of 3.
  const int64_t slots = int64_t{processors} * (matrix && small ? 3 : 1), step = !matrix ? 1 : small ? 4 : 8;
  const ReadoutArgs a{p, parts_for(sequences, (tiles + step - 1) / step, slots, matrix ? 3 : 1, 1024), tiles};
  const auto s = static_cast<arch::stream_t>(stream);
  switch (p.dtype) {
    case DType::f32: return plain::launch_readout<F32>(a, s);
    case DType::f16: return matrix ? launch_matrix<arch::F16>(a, s) : plain::launch_readout<arch::F16>(a, s);
    case DType::bf16: return matrix ? launch_matrix<arch::BF16>(a, s) : plain::launch_readout<arch::BF16>(a, s);
  }
  return kInvalid;
}

}  // namespace vdit

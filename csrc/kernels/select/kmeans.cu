// Host entry of the nearest centroids, and the kernel that rounds and pads centroids.
#include "kernels/select/kmeans.h"

#include "kernels/select/kmeans_assign.h"

namespace vdit::gpu::kmeans {

constexpr int kPackThreads = 256;

// One warp per centroid: rounded to T and padded to kDim values; half its squared norm, negative.
template <class T>
VD_KERNEL(kPackThreads, 1)
pack_centroids(const VD_GRID_CONST Args a, int32_t padded_dim, uint16_t* centres, float* norms) {
  const KmeansParams& p = a.params;
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32;
  if (row >= int64_t(p.batch) * p.heads * a.padded) return;
  const int64_t sequence = row / a.padded, c = row % a.padded;
  const float* from = static_cast<const float*>(p.centre.data) + sequence / p.heads * p.centre.batch_stride +
                      sequence % p.heads * p.centre.head_stride + c * p.centre.row_stride;
  float norm = 0.f;
  for (int d = 2 * lane; d < padded_dim; d += 64) {
    float low = c < p.centres && d < p.dim ? from[d] : 0.f;
    float high = c < p.centres && d + 1 < p.dim ? from[d + 1] : 0.f;
    const uint32_t pair = arch::pack<T>(low, high);
    arch::stg32(centres + row * padded_dim + d, pair);
    arch::unpack<T>(pair, low, high);
    norm = fmaf(high, high, fmaf(low, low, norm));
  }
  VD_UNROLL for (int step = 16; step > 0; step /= 2) norm += arch::shfl_xor_f(norm, step);
  if (lane == 0) norms[row] = c < p.centres ? -0.5f * norm : -INFINITY;
}

struct Layout {
  int32_t dim = 0, padded = 0;
  int64_t rows = 0;  // centroids of all heads, padded
  size_t norms_at = 0, bytes = 0;
};

Layout layout(const KmeansParams& p) {
  Layout l;
  l.dim = p.dim <= 64 ? 64 : p.dim <= 128 ? 128 : 256;
  l.padded = (p.centres + kCentres - 1) / kCentres * kCentres;
  l.rows = int64_t(p.batch) * p.heads * l.padded;
  l.norms_at = size_t(l.rows) * l.dim * 2;
  l.bytes = l.norms_at + size_t(l.rows) * 4;
  return l;
}

bool rows_aligned(const KmeansParams& p) {
  return reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0 && p.dim % 8 == 0 &&
         (p.batch <= 1 || p.x.batch_stride % 8 == 0) && (p.tokens <= 1 || p.x.row_stride % 8 == 0) &&
         (p.heads <= 1 || p.x.head_stride % 8 == 0);
}

template <class T, int kDim>
int launch_assign(Args args, arch::stream_t stream) {
  using C = Config<kDim>;
  const KmeansParams& p = args.params;
  const int64_t tiles = (int64_t(p.tokens) + C::kTokens - 1) / C::kTokens, blocks = tiles * p.batch * p.heads;
  if (blocks > INT32_MAX) return 1;
  args.tiles = int32_t(tiles);
  return arch::launch(assign<T, kDim>, dim3(unsigned(blocks)), dim3(kThreads), C::kBytes, stream, args);
}

template <class T>
int run(const Args& args, const Layout& l, arch::stream_t stream) {
  const int64_t blocks = (l.rows + kPackThreads / 32 - 1) / (kPackThreads / 32);
  if (blocks > INT32_MAX) return 1;
  if (const int error = arch::launch(pack_centroids<T>, dim3(unsigned(blocks)), dim3(kPackThreads), 0, stream, args,
                                     l.dim, const_cast<uint16_t*>(args.centres), const_cast<float*>(args.norms)))
    return error;
  if (l.dim == 64) return launch_assign<T, 64>(args, stream);
  if (l.dim == 128) return launch_assign<T, 128>(args, stream);
  return launch_assign<T, 256>(args, stream);
}

}  // namespace vdit::gpu::kmeans

namespace vdit {

size_t kmeans_workspace_bytes(const KmeansParams& params) { return gpu::kmeans::layout(params).bytes; }

int cuda_kmeans_assign(const KmeansParams& p, void* workspace, size_t bytes, void* stream) {
  constexpr int kInvalid = 1;  // cudaErrorInvalidValue
  const gpu::kmeans::Layout l = gpu::kmeans::layout(p);
  if (p.dim < 1 || p.dim > kKmeansMaxDim || p.centres < 1 || p.dtype == DType::f32 || bytes < l.bytes) return kInvalid;
  if (int64_t(p.batch) * p.heads * p.tokens == 0) return 0;
  auto* at = static_cast<char*>(workspace);
  const gpu::kmeans::Args args{
      p,        reinterpret_cast<const uint16_t*>(at), reinterpret_cast<const float*>(at + l.norms_at),
      l.padded, gpu::kmeans::rows_aligned(p) ? 1 : 0,  0};
  const auto s = static_cast<arch::stream_t>(stream);
  return p.dtype == DType::bf16 ? gpu::kmeans::run<arch::BF16>(args, l, s) : gpu::kmeans::run<arch::F16>(args, l, s);
}

}  // namespace vdit

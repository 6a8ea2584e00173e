// Host entry of the adaptive norms. Compiled by nvcc for the package and by the host compiler for the emulator.
#include "kernels/fused/adaln.h"

#include "kernels/fused/adaln_kernel.h"

namespace vdit {
namespace {

using namespace gpu::adaln;
using gpu::pieces::aligned;

constexpr int kInvalid = 1;      // cudaErrorInvalidValue
constexpr int kRowsPerCta = 16;  // most rows that share what a CTA holds of the tables
constexpr int kCtasPerProcessor = 8;

bool aligned(const AdaLNNorm& n) { return aligned(n.weight, n.dtype) && aligned(n.bias, n.dtype); }

bool aligned(const AdaLNParams& p) {
  return p.dim % kPiece == 0 && aligned(p, p.x) && aligned(p, p.y) && aligned(p, p.gate) && aligned(p, p.scale) &&
         aligned(p, p.shift) && aligned(p.norm) && aligned(p.post) && aligned(p.x_new, p.x.dtype) &&
         aligned(p.h, p.x.dtype);
}

template <class H, bool kResidual>
int launch(const Args& args, int64_t blocks, arch::stream_t stream) {
  const int warps = (args.pieces + 31) / 32;
  const dim3 grid{unsigned(blocks)};
  if (warps <= 4)  // up to 1024 elements
    return arch::launch(adaln_rows<H, 1, 128, 5, kResidual>, grid, dim3(32 * warps), 0, stream, args);
  if (warps <= 20)  // up to 5120
    return arch::launch(adaln_rows<H, 2, 320, 2, kResidual>, grid, dim3(32 * ((warps + 1) / 2)), 0, stream, args);
  return arch::launch(adaln_rows<H, 4, 512, 1, kResidual>, grid, dim3(32 * ((warps + 3) / 4)), 0, stream, args);
}

template <class H>
int launch(const Args& args, int64_t blocks, arch::stream_t stream) {
  return args.p.y.data != nullptr ? launch<H, true>(args, blocks, stream) : launch<H, false>(args, blocks, stream);
}

}  // namespace

int cuda_adaln(const AdaLNParams& p, int processors, void* stream) {
  const int64_t rows = p.batch * p.tokens;
  if (rows == 0) return 0;
  if (rows < 0 || p.dim < 1 || p.dim > kAdaLNMaxDim || processors < 1) return kInvalid;
  // One row each while that keeps the GPU busy no longer than it takes to fill it.
  const int64_t filled = int64_t(processors) * kCtasPerProcessor;
  int64_t per_cta = rows / filled;
  per_cta = per_cta < 1 ? 1 : per_cta < kRowsPerCta ? per_cta : kRowsPerCta;
  const int64_t blocks = (rows + per_cta - 1) / per_cta;
  if (blocks > INT32_MAX) return kInvalid;
  const Args args{p, int32_t(per_cta), (p.dim + kPiece - 1) / kPiece, aligned(p)};
  const auto s = static_cast<arch::stream_t>(stream);
  if (p.half == DType::f16) return launch<arch::F16>(args, blocks, s);
  return launch<arch::BF16>(args, blocks, s);
}

}  // namespace vdit

// Host entries of the feature cache's kernels. Compiled by nvcc for the package and by the host compiler for the
// emulator.
#include "kernels/cache/cache.h"

#include "kernels/cache/cache_kernel.h"
#include "kernels/cache/update_e4m3.h"

namespace vdit {
namespace {

using namespace gpu::cache;
using gpu::pieces::aligned;

constexpr int kInvalid = 1;  // cudaErrorInvalidValue

// The grid for rows of `dim` elements, or 0 where they are too many for 32 bits.
template <class Params>
int64_t plan(const Params& p, bool whole, Args<Params>& args) {
  const int64_t rows = p.batch * p.tokens, pieces = (int64_t(p.dim) + kPiece - 1) / kPiece;
  if (p.batch < 1 || p.tokens < 1 || p.dim < 1 || p.total <= (rows - 1) * p.dim || p.total > rows * p.dim) return 0;
  if (rows > INT32_MAX || rows * pieces > INT32_MAX) return 0;
  args.p = p;
  args.pieces = uint32_t(pieces);
  args.items = uint32_t(rows * pieces);
  args.aligned = whole && (p.dim % kPiece == 0 || rows == 1);
  return (rows * pieces + kThreads - 1) / kThreads;
}

// Whether rows of factors are made of whole pieces.
template <class Params>
bool aligned_factors(const Params& p, const void* factors, const float* scales, int64_t stride) {
  return scales != nullptr ? gpu::e4m3::aligned(factors, stride) : aligned(factors, p.factor_dtype, stride);
}

bool aligned(const FactorUpdateParams& p) {
  return aligned(p, p.output) && aligned(p, p.minus) &&
         aligned_factors(p, p.factors, p.scales, p.last > 0 ? p.factor_stride : 0);
}

bool aligned(const ForecastParams& p) {
  for (int j = 0; j < p.modules; ++j) {
    const ForecastModule& m = p.module[j];
    if (!aligned_factors(p, m.factors, m.scales, p.factors > 1 ? m.factor_stride : 0) || !aligned(p, m.gate))
      return false;
  }
  return aligned(p, p.x) && aligned(p, AdaLNRows{p.out, p.out_batch_stride, p.out_token_stride, p.out_dtype});
}

template <class H>
int launch(const Args<FactorUpdateParams>& args, dim3 grid, arch::stream_t stream) {
  return arch::launch(factor_update<H>, grid, dim3(kThreads), 0, stream, args);
}

template <class H, bool kE4m3>
int launch_forecast(const Args<ForecastParams>& args, dim3 grid, arch::stream_t stream) {
  if (args.p.factors <= 2) return arch::launch(forecast_gate_add<H, 2, kE4m3>, grid, dim3(kThreads), 0, stream, args);
  return arch::launch(forecast_gate_add<H, kMaxFactors, kE4m3>, grid, dim3(kThreads), 0, stream, args);
}

template <class H>
int launch(const Args<ForecastParams>& args, dim3 grid, arch::stream_t stream) {
  if (args.p.module[0].scales != nullptr) return launch_forecast<H, true>(args, grid, stream);
  return launch_forecast<H, false>(args, grid, stream);
}

template <class Params>
int run(const Params& p, void* stream) {
  if (p.total == 0) return 0;
  Args<Params> args;
  const int64_t blocks = plan(p, aligned(p), args);
  if (blocks == 0) return kInvalid;
  const dim3 grid{unsigned(blocks)};
  const auto s = static_cast<arch::stream_t>(stream);
  return p.half == DType::f16 ? launch<arch::F16>(args, grid, s) : launch<arch::BF16>(args, grid, s);
}

template <int kPieces>
int launch_rows(const RowArgs& args, dim3 grid, dim3 block, arch::stream_t stream) {
  if (args.p.last <= 1) return arch::launch(factor_update_e4m3<kPieces, 2>, grid, block, 0, stream, args);
  return arch::launch(factor_update_e4m3<kPieces, kMaxFactors>, grid, block, 0, stream, args);
}

int run_e4m3(const FactorUpdateParams& p, arch::stream_t stream) {
  const int64_t rows = p.batch * p.tokens;
  if (rows == 0) return 0;
  if (rows < 0 || rows > INT32_MAX || p.dim < 1 || p.dim > kMaxScaledRow || p.total != rows * p.dim) return kInvalid;
  RowArgs args{p, uint32_t(rows), 1, (p.dim + kPiece - 1) / kPiece, aligned(p) && (p.dim % kPiece == 0 || rows == 1)};
  int threads = kThreads, each = 1;  // of a CTA; pieces of a thread
  if (args.pieces <= 32) {
    while (args.threads < args.pieces) args.threads *= 2;
  } else {
    while (each < 4 && each * kThreads < args.pieces) each *= 2;
    threads = args.threads = ((args.pieces + each - 1) / each + 31) / 32 * 32;
  }
  const int64_t in_cta = threads / args.threads;
  const dim3 grid{unsigned((rows + in_cta - 1) / in_cta)}, block{unsigned(threads)};
  if (each == 1) return launch_rows<1>(args, grid, block, stream);
  if (each == 2) return launch_rows<2>(args, grid, block, stream);
  return launch_rows<4>(args, grid, block, stream);
}

}  // namespace

int cuda_factor_update(const FactorUpdateParams& p, void* stream) {
  if (p.last < 0 || p.last >= kMaxFactors) return kInvalid;
  if (p.scales != nullptr) return run_e4m3(p, static_cast<arch::stream_t>(stream));
  return run(p, stream);
}

int cuda_forecast_gate_add(const ForecastParams& p, void* stream) {
  if (p.factors < 1 || p.factors > kMaxFactors || p.modules < 1 || p.modules > kMaxForecastModules) return kInvalid;
  return run(p, stream);
}

}  // namespace vdit

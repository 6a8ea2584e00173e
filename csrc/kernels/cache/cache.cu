// Host entries of the feature cache's kernels. Compiled by nvcc for the package and by the host compiler for the
// emulator.
#include "kernels/cache/cache.h"

#include "kernels/cache/cache_kernel.h"

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

bool aligned(const FactorUpdateParams& p) {
  return aligned(p, p.output) && aligned(p, p.minus) &&
         aligned(p.factors, p.factor_dtype, p.last > 0 ? p.factor_stride : 0);
}

bool aligned(const ForecastParams& p) {
  for (int j = 0; j < p.modules; ++j) {
    const ForecastModule& m = p.module[j];
    if (!aligned(m.factors, p.factor_dtype, p.factors > 1 ? m.factor_stride : 0) || !aligned(p, m.gate)) return false;
  }
  return aligned(p, p.x) && aligned(p, AdaLNRows{p.out, p.out_batch_stride, p.out_token_stride, p.out_dtype});
}

template <class H>
int launch(const Args<FactorUpdateParams>& args, dim3 grid, arch::stream_t stream) {
  return arch::launch(factor_update<H>, grid, dim3(kThreads), 0, stream, args);
}

template <class H>
int launch(const Args<ForecastParams>& args, dim3 grid, arch::stream_t stream) {
  if (args.p.factors <= 2) return arch::launch(forecast_gate_add<H, 2>, grid, dim3(kThreads), 0, stream, args);
  return arch::launch(forecast_gate_add<H, kMaxFactors>, grid, dim3(kThreads), 0, stream, args);
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

}  // namespace

int cuda_factor_update(const FactorUpdateParams& p, void* stream) {
  if (p.last < 0 || p.last >= kMaxFactors) return kInvalid;
  return run(p, stream);
}

int cuda_forecast_gate_add(const ForecastParams& p, void* stream) {
  if (p.factors < 1 || p.factors > kMaxFactors || p.modules < 1 || p.modules > kMaxForecastModules) return kInvalid;
  return run(p, stream);
}

}  // namespace vdit

// Host entry of the selection. Compiled by nvcc for the package and by the host compiler for the emulator.
#include "kernels/select/select.h"

#include "kernels/select/select_rows.h"

namespace vdit {
namespace {

constexpr int kInvalid = 1;           // cudaErrorInvalidValue
constexpr int kStagedEntries = 4096;  // rows up to this length keep their keys in shared memory
constexpr int kSmallThreads = 128, kLargeThreads = 1024;

template <int kThreads, bool kMass, bool kStaged>
int launch(const SelectParams& p, arch::stream_t stream) {
  const size_t smem = gpu::selection::Row<kThreads, kMass, kStaged>::kHistogramBytes + (kStaged ? size_t(p.n) * 4 : 0);
  return arch::launch(gpu::selection::select_rows<kThreads, kMass, kStaged>, dim3(unsigned(p.rows)), dim3(kThreads),
                      smem, stream, p);
}

}  // namespace

int cuda_select(const SelectParams& p, void* stream) {
  if (p.rows == 0) return 0;
  if (p.rows < 0 || p.rows > INT32_MAX || p.n < 1 || p.n > (p.by_mass ? kMaxMassRow : kMaxRow)) return kInvalid;
  const auto s = static_cast<arch::stream_t>(stream);
  if (p.n <= kStagedEntries)
    return p.by_mass ? launch<kSmallThreads, true, true>(p, s) : launch<kSmallThreads, false, true>(p, s);
  return p.by_mass ? launch<kLargeThreads, true, false>(p, s) : launch<kLargeThreads, false, false>(p, s);
}

}  // namespace vdit

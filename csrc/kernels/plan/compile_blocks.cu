// Host entries of the compilation of block maps. Compiled by nvcc for the package and by the host compiler for the
// emulator.
#include "kernels/plan/compile_blocks.h"

#include "kernels/plan/block_runs.h"

namespace vdit {
namespace {

using namespace gpu::plan;

constexpr int kInvalid = 1;  // cudaErrorInvalidValue

int64_t blocks_of_warps(int64_t rows) { return (rows + kWarps - 1) / kWarps; }

bool valid(const BlockMap& m) {
  return m.groups > 0 && m.nq > 0 && m.nk >= 0 && m.groups * m.nq <= INT32_MAX && m.tiles <= INT32_MAX &&
         m.tiles * ((m.nk + 1) / 2) <= INT32_MAX && m.q_tile >= 0;
}

}  // namespace

int cuda_list_tiles(const BlockMap& m, const TileList& list, void* stream) {
  if (m.tiles == 0) return 0;
  if (!valid(m)) return kInvalid;
  const auto s = static_cast<arch::stream_t>(stream);
  if (const int error =
          arch::launch(count_runs, dim3(unsigned(blocks_of_warps(m.groups * m.nq))), dim3(kWarpThreads), 0, s, m, list))
    return error;
  return arch::launch(list_tiles, dim3(unsigned(m.groups)), dim3(kListThreads), 0, s, m, list);
}

int cuda_place_runs(const BlockMap& m, const TileList& list, const int64_t* order, const PlanLists& out, void* stream) {
  const auto s = static_cast<arch::stream_t>(stream);
  if (m.tiles > 0 && !valid(m)) return kInvalid;
  if (const int error = arch::launch(place_tiles, dim3(1), dim3(kPlaceThreads), 0, s, m, list, order, out))
    return error;
  if (m.tiles == 0) return 0;
  return arch::launch(emit_runs, dim3(unsigned(blocks_of_warps(m.tiles))), dim3(kWarpThreads), 0, s, m, list, order,
                      out);
}

}  // namespace vdit

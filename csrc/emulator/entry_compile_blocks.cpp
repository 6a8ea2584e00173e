// The compilation of block maps, through the host entries that the CUDA operator calls; the caller sorts.
#include <algorithm>
#include <numeric>

#include "emulator/harness.h"
#include "kernels/plan/compile_blocks.h"

using namespace vdit;

VDIT_EMU_EXPORT size_t vdit_emu_block_map_bytes() { return sizeof(BlockMap); }

VDIT_EMU_EXPORT int vdit_emu_compile_blocks(const BlockMap* map, const PlanLists* lists, const emu::Policy* policy,
                                            char* error, size_t error_bytes) {
  return emu::guarded_run(policy, error, error_bytes, [&] {
    emu::Harness h;
    BlockMap m = *map;
    const auto rows = size_t(m.groups * m.nq), tiles = size_t(m.tiles);
    m.keep = h.input("keep", m.keep, rows * size_t(m.nk));
    m.q_len = h.input("q_len", m.q_len, size_t(m.q_groups * m.nq));
    m.kv_len = h.input("kv_len", m.kv_len, size_t(m.kv_groups * m.nk));
    const TileList list{
        static_cast<int64_t*>(h.scratch("reads", rows * 8)), static_cast<int32_t*>(h.scratch("run counts", rows * 4)),
        static_cast<int32_t*>(h.scratch("source", tiles * 12)), static_cast<int64_t*>(h.scratch("work", tiles * 8))};
    PlanLists out = *lists;
    out.tiles = h.output("tiles", out.tiles, tiles * 3);
    out.run_ptr = h.output("run_ptr", out.run_ptr, tiles + 1);
    out.runs = h.output("runs", out.runs, tiles * size_t((m.nk + 1) / 2) * 3);
    if (const int code = cuda_list_tiles(m, list, nullptr)) return code;
    std::vector<int64_t> order(tiles);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return list.work[a] > list.work[b]; });
    const int code = cuda_place_runs(m, list, h.input("order", order.data(), tiles), out, nullptr);
    h.finish();
    return code;
  });
}

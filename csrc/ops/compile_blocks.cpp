#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/compile_blocks.h"
#include "ops/common.h"

namespace vdit {
namespace {

using Lists = std::tuple<Tensor, Tensor, Tensor>;
using Count = std::optional<int64_t>;

// The checked arguments, contiguous.
struct Map {
  Tensor keep, q_len, kv_len;
  BlockMap params{};

  Map(const Tensor& keep_, const Tensor& q_len_, const Tensor& kv_len_, int64_t lq, const Count& q_tile)
      : keep(keep_), q_len(q_len_), kv_len(kv_len_) {
    VDIT_CHECK(keep.scalar_type() == ScalarType::Bool && keep.dim() == 3, "compile_blocks: keep is ",
               dtype_text(keep.scalar_type()), " ", shape_text(keep),
               "; expected bool [groups, query blocks, key blocks]");
    params.groups = keep.size(0);
    params.nq = keep.size(1);
    params.nk = keep.size(2);
    params.q_groups = lengths(q_len, "q_len", params.nq);
    params.kv_groups = lengths(kv_len, "kv_len", params.nk);
    VDIT_CHECK(lq >= 0 && lq <= INT32_MAX, "compile_blocks: lq is ", lq, "; expected 0 to ", INT32_MAX, " rows");
    VDIT_CHECK(!q_tile || *q_tile >= 1, "compile_blocks: q_tile is ", q_tile.value_or(0), "; expected at least 1");
    params.q_tile = q_tile.value_or(0);
    params.tiles = params.nq == 0 ? 0 : params.groups * (params.nq + (q_tile ? lq / *q_tile : 0));
    for (Tensor* t : {&keep, &q_len, &kv_len}) {
      if (!t->is_contiguous()) *t = torch::stable::contiguous(*t);
    }
    params.keep = static_cast<const uint8_t*>(keep.const_data_ptr());
    params.q_len = q_len.const_data_ptr<int64_t>();
    params.kv_len = kv_len.const_data_ptr<int64_t>();
  }

  int32_t lengths(const Tensor& t, const char* name, int64_t blocks) const {
    VDIT_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 2 && (t.size(0) == 1 || t.size(0) == params.groups) &&
                   t.size(1) == blocks,
               "compile_blocks: ", name, " is ", dtype_text(t.scalar_type()), " ", shape_text(t),
               "; expected int64 [1, ", blocks, "] or [", params.groups, ", ", blocks, "]");
    VDIT_CHECK(same_device(t, keep), "compile_blocks: ", name, " is on ", device_text(t), " but keep is on ",
               device_text(keep), "; move them to one device");
    return int32_t(t.size(0));
  }
  Tensor ints(std::initializer_list<int64_t> shape, ScalarType type = ScalarType::Int) const {
    return torch::stable::new_empty(keep, shape, type);
  }
  static void check_runs(int64_t runs) {
    VDIT_CHECK(runs <= INT32_MAX, "compile_blocks: the plan needs ", runs,
               " key runs, more than int32 can index; use larger blocks or fewer heads");
  }
};

// On the CPU, where values can be looked at: no length is negative, and no row of them sums to more than `most`.
void check_lengths(const Tensor& t, const char* name, int64_t most, const char* what) {
  const int64_t* length = t.const_data_ptr<int64_t>();  // contiguous: a Map's
  for (int64_t g = 0; g < t.size(0); ++g) {
    int64_t left = most;
    for (int64_t i = 0; i < t.size(1); ++i, ++length) {
      VDIT_CHECK(*length >= 0, "compile_blocks: ", name, "[", g, ", ", i, "] is ", *length, "; lengths are at least 0");
      VDIT_CHECK(*length <= left, "compile_blocks: ", name, "[", g, "] sums to more than ", what, ", ", most);
      left -= *length;
    }
  }
}

PlanLists pointers(Lists& lists) {
  auto& [tiles, run_ptr, runs] = lists;
  return {tiles.mutable_data_ptr<int32_t>(), run_ptr.mutable_data_ptr<int32_t>(), runs.mutable_data_ptr<int32_t>()};
}

Lists compile_blocks_cpu(const Tensor& keep, const Tensor& q_len, const Tensor& kv_len, int64_t lq,
                         const Count& q_tile) {
  const Map map(keep, q_len, kv_len, lq, q_tile);
  check_lengths(map.q_len, "q_len", lq, "lq");
  check_lengths(map.kv_len, "kv_len", INT32_MAX, "int32 can index");
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, map.params.nk));
  const BlockCompiler compiler(map.params, [grain](int64_t n, const std::function<void(int64_t, int64_t)>& fn) {
    torch::stable::parallel_for(0, n, grain, fn);
  });
  Map::check_runs(compiler.runs());
  Lists lists{map.ints({compiler.tiles(), 3}), map.ints({compiler.tiles() + 1}), map.ints({compiler.runs(), 3})};
  compiler.write(pointers(lists));
  return lists;
}

#ifdef VDIT_CUDA
// torch.sort(work, descending=True, stable=True).indices
Tensor descending_order(const Tensor& work) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(work),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t(0)), torch::stable::detail::from(true)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owned by the stack until it is taken
  return torch::stable::detail::to<Tensor>(stack[1]);
}

Lists compile_blocks_cuda(const Tensor& keep, const Tensor& q_len, const Tensor& kv_len, int64_t lq,
                          const Count& q_tile) {
  const int32_t device = keep.get_device_index();
  const Map map(keep, q_len, kv_len, lq, q_tile);
  const torch::stable::accelerator::DeviceGuard guard(device);
  const BlockMap& m = map.params;
  const int64_t runs = m.tiles * ((m.nk + 1) / 2);
  Map::check_runs(runs);
  void* const stream = current_cuda_stream(device);
  Tensor reads = map.ints({m.groups * m.nq}, ScalarType::Long), counts = map.ints({m.groups * m.nq});
  Tensor source = map.ints({m.tiles, 3}), work = map.ints({m.tiles}, ScalarType::Long);
  const TileList list{reads.mutable_data_ptr<int64_t>(), counts.mutable_data_ptr<int32_t>(),
                      source.mutable_data_ptr<int32_t>(), work.mutable_data_ptr<int64_t>()};
  check_cuda(cuda_list_tiles(m, list, stream), "compile_blocks");
  const Tensor order = descending_order(work);
  Lists lists{map.ints({m.tiles, 3}), map.ints({m.tiles + 1}), map.ints({runs, 3})};
  check_cuda(cuda_place_runs(m, list, order.const_data_ptr<int64_t>(), pointers(lists), stream), "compile_blocks");
  return lists;
}
#else
Lists compile_blocks_cuda(const Tensor&, const Tensor&, const Tensor&, int64_t, const Count&) {
  fail_without_cuda("compile_blocks");
}
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) { m.impl("compile_blocks", TORCH_BOX(&vdit::compile_blocks_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("compile_blocks", TORCH_BOX(&vdit::compile_blocks_cuda)); }

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/rows.h"
#include "ops/common.h"
#include "ops/overlap.h"

namespace vdit {
namespace {

using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

std::string item(const std::string& op, const char* name, size_t i) {
  return op + ": " + name + "[" + std::to_string(i) + "]";
}

// One tensor [batch, rows, ...] whose rows are contiguous.
void check_rows(const Tensor& t, const std::string& what) {
  VDIT_CHECK(t.dim() >= 3, what, " has shape ", shape_text(t), "; expected [batch, rows, channels] or more dimensions");
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i >= 2; --i) {
    VDIT_CHECK(t.size(i) <= 1 || t.stride(i) == expected, what, " has stride ", t.stride(i), " in dimension ", i,
               "; a row must be contiguous: call .contiguous()");
    expected *= t.size(i);
  }
  VDIT_CHECK(t.size(0) < (int64_t{1} << 31) - 4096 && t.size(1) < (int64_t{1} << 31) - 4096, what, " has shape ",
             shape_text(t), "; sizes must fit 32 bits");
}

// Whether no two rows share memory.
bool rows_are_own(const Tensor& t, int64_t row_bytes) {
  const auto size = static_cast<int64_t>(t.element_size());
  std::pair<int64_t, int64_t> outer[] = {{t.stride(0) * size, t.size(0)}, {t.stride(1) * size, t.size(1)}};
  if (outer[0] > outer[1]) std::swap(outer[0], outer[1]);
  int64_t extent = row_bytes;
  for (const auto& [stride, count] : outer) {
    if (count <= 1) continue;
    if (stride < extent) return false;
    extent += (count - 1) * stride;
  }
  return true;
}

// The lists: rows int32 [1 or batch, slots], count int32 [1 or batch].
void point_at_lists(RowsParams& p, const std::string& op, const Tensor& x, const Tensor& rows, const Maybe& count) {
  VDIT_CHECK(rows.scalar_type() == ScalarType::Int, op, ": rows is ", dtype_text(rows.scalar_type()),
             "; expected int32");
  VDIT_CHECK(
      rows.dim() == 2 && (rows.size(0) == 1 || rows.size(0) == p.batch) && rows.size(1) < (int64_t{1} << 31) - 4096, op,
      ": rows has shape ", shape_text(rows), "; expected [1 or ", p.batch, ", slots]");
  VDIT_CHECK(same_device(rows, x), op, ": rows is on ", device_text(rows), " but the tensors are on ", device_text(x));
  p.slots = int32_t(rows.size(1));
  p.rows = rows.const_data_ptr<int32_t>();
  p.rows_batch = rows.size(0) == 1 ? 0 : rows.stride(0);
  p.rows_slot = rows.stride(1);
  if (!count) return;
  VDIT_CHECK(count->scalar_type() == ScalarType::Int, op, ": count is ", dtype_text(count->scalar_type()),
             "; expected int32");
  VDIT_CHECK(count->dim() == 1 && (count->size(0) == 1 || count->size(0) == p.batch), op, ": count has shape ",
             shape_text(*count), "; expected [1 or ", p.batch, "]");
  VDIT_CHECK(same_device(*count, x), op, ": count is on ", device_text(*count), " but the tensors are on ",
             device_text(x));
  p.count = count->const_data_ptr<int32_t>();
  p.count_batch = count->size(0) == 1 ? 0 : count->stride(0);
}

RowsParams prepare(const std::string& op, const Tensors& full, const Tensor& rows, const Maybe& count) {
  VDIT_CHECK(!full.empty() && full.size() <= kMaxRowTensors, op, ": ", full.size(), " tensors; pass 1 to ",
             kMaxRowTensors, " with one row list");
  RowsParams p{};
  p.pairs = int32_t(full.size());
  for (size_t i = 0; i < full.size(); ++i) {
    const std::string what = item(op, "full", i);
    const Tensor &t = full[i], &first = full[0];
    check_rows(t, what);
    VDIT_CHECK(t.size(0) == first.size(0) && t.size(1) == first.size(1), what, " has shape ", shape_text(t),
               " but full[0] has ", shape_text(first), "; batch and rows must be the same");
    VDIT_CHECK(same_device(t, first), what, " is on ", device_text(t), " but full[0] is on ", device_text(first));
    RowPair& pair = p.pair[i];
    const auto bytes = static_cast<int64_t>(t.element_size());
    pair.row_bytes = bytes;
    for (int64_t d = 2; d < t.dim(); ++d) pair.row_bytes *= t.size(d);
    VDIT_CHECK(pair.row_bytes <= (int64_t{1} << 24), what, " has rows of ", pair.row_bytes, " bytes; at most 2^24");
    pair.full_batch = t.stride(0) * bytes;
    pair.full_row = t.stride(1) * bytes;
  }
  p.batch = int32_t(full[0].size(0));
  p.tokens = int32_t(full[0].size(1));
  point_at_lists(p, op, full[0], rows, count);
  return p;
}

std::vector<int64_t> part_shape(const Tensor& full, int64_t slots) {
  std::vector<int64_t> shape{full.size(0), slots};
  for (int64_t d = 2; d < full.dim(); ++d) shape.push_back(full.size(d));
  return shape;
}

bool is_empty(const RowsParams& p) { return int64_t{p.batch} * p.slots == 0; }

void check_range(bool in_range, const std::string& op, const RowsParams& p) {
  VDIT_CHECK(in_range, op, ": rows has entries outside 0 to ", int64_t{p.tokens} - 1,
             " among those in use; lower count, or mend the list");
}

// run(first, last) over all rows of all tensors, in parallel.
template <class Run>
void over_rows(const RowsParams& p, const std::string& op, Run run) {
  if (is_empty(p)) return;
  constexpr int64_t kBytesPerTask = 1 << 16;
  int64_t widest = 1;
  for (int i = 0; i < p.pairs; ++i) widest = std::max(widest, p.pair[i].row_bytes);
  std::atomic<bool> in_range{true};
  torch::stable::parallel_for(0, int64_t{p.pairs} * p.batch * p.slots, std::max<int64_t>(1, kBytesPerTask / widest),
                              [&](int64_t first, int64_t last) {
                                if (!run(p, first, last)) in_range = false;
                              });
  check_range(in_range, op, p);
}

// ---- gather_rows

RowsParams prepare_gather(const Tensors& full, const Tensor& rows, const Maybe& count, Tensors& part) {
  RowsParams p = prepare("gather_rows", full, rows, count);
  for (size_t i = 0; i < full.size(); ++i) {
    part.push_back(torch::stable::new_empty(full[i], part_shape(full[i], p.slots)));
    RowPair& pair = p.pair[i];
    pair.full = const_cast<void*>(full[i].const_data_ptr());  // read only
    pair.part = part[i].mutable_data_ptr();
    pair.part_row = pair.row_bytes;
    pair.part_batch = pair.row_bytes * p.slots;
  }
  return p;
}

Tensors gather_rows_cpu(const Tensors& full, const Tensor& rows, const Maybe& count) {
  Tensors part;
  const RowsParams p = prepare_gather(full, rows, count, part);
  over_rows(p, "gather_rows", cpu_gather_rows);
  return part;
}

// ---- scatter_rows

void point_at_gate(RowsParams& p, const Tensors& full, const Maybe& gate) {
  const int64_t width = p.pair[0].row_bytes / static_cast<int64_t>(full[0].element_size());
  for (size_t i = 0; i < full.size(); ++i) {
    const std::string what = item("scatter_rows", "full", i);
    VDIT_CHECK(kernel_dtype(full[i], what) == kernel_dtype(full[0], item("scatter_rows", "full", 0)), what, " is ",
               dtype_text(full[i].scalar_type()), " but full[0] is ", dtype_text(full[0].scalar_type()),
               "; with a gate or add they must be alike");
    VDIT_CHECK(!gate || p.pair[i].row_bytes == p.pair[0].row_bytes, what, " has shape ", shape_text(full[i]),
               " but full[0] has ", shape_text(full[0]), "; with a gate their rows must be alike");
  }
  p.dtype = kernel_dtype(full[0], item("scatter_rows", "full", 0));
  if (!gate) return;
  VDIT_CHECK(gate->dim() == 3 && (gate->size(0) == 1 || gate->size(0) == p.batch) &&
                 (gate->size(1) == 1 || gate->size(1) == p.slots) && (gate->size(2) == 1 || gate->size(2) == width),
             "scatter_rows: gate has shape ", shape_text(*gate), "; expected [1 or ", p.batch, ", 1 or ", p.slots,
             ", 1 or ", width, "]");
  VDIT_CHECK(gate->size(2) <= 1 || gate->stride(2) == 1, "scatter_rows: gate has stride ", gate->stride(2),
             " in its last dimension; it must be contiguous there: call .contiguous()");
  VDIT_CHECK(same_device(*gate, full[0]), "scatter_rows: gate is on ", device_text(*gate), " but the tensors are on ",
             device_text(full[0]));
  p.gate.dtype = kernel_dtype(*gate, "scatter_rows: gate");
  VDIT_CHECK(p.gate.dtype == DType::f32 || p.gate.dtype == p.dtype, "scatter_rows: gate is ",
             dtype_text(gate->scalar_type()), " but the tensors are ", dtype_text(full[0].scalar_type()),
             "; expected float32 or the same");
  p.gate.data = gate->const_data_ptr();
  p.gate.batch = gate->size(0) == 1 ? 0 : gate->stride(0);
  p.gate.slot = gate->size(1) == 1 ? 0 : gate->stride(1);
  p.gate.channel = gate->size(2) == 1 ? 0 : 1;
}

RowsParams prepare_scatter(const Tensors& full, const Tensors& part, const Tensor& rows, const Maybe& count,
                           const Maybe& gate, bool add) {
  VDIT_CHECK(full.size() == part.size(), "scatter_rows: ", full.size(), " full tensors but ", part.size(),
             " with their rows; every one needs its own");
  RowsParams p = prepare("scatter_rows", full, rows, count);
  for (size_t i = 0; i < full.size(); ++i) {
    const std::string what = item("scatter_rows", "part", i);
    const Tensor& t = part[i];
    check_rows(t, what);
    const std::vector<int64_t> shape = part_shape(full[i], p.slots);
    VDIT_CHECK(t.dim() == full[i].dim() && std::equal(shape.begin(), shape.end(), t.sizes().begin()), what,
               " has shape ", shape_text(t), " but full[", i, "] has ", shape_text(full[i]), " and rows ", p.slots,
               " slots; expected [batch, slots, ...]");
    VDIT_CHECK(t.scalar_type() == full[i].scalar_type(), what, " is ", dtype_text(t.scalar_type()), " but full[", i,
               "] is ", dtype_text(full[i].scalar_type()));
    VDIT_CHECK(same_device(t, full[i]), what, " is on ", device_text(t), " but full[", i, "] is on ",
               device_text(full[i]));
    for (int64_t d = 0; d < 2; ++d)
      VDIT_CHECK(full[i].size(d) <= 1 || full[i].stride(d) != 0, item("scatter_rows", "full", i),
                 " has stride 0 in dimension ", d, "; its elements share memory, pass a tensor that is not expanded");
    RowPair& pair = p.pair[i];
    const auto bytes = static_cast<int64_t>(t.element_size());
    pair.full = full[i].mutable_data_ptr();
    pair.part = const_cast<void*>(t.const_data_ptr());  // read only
    pair.part_batch = t.stride(0) * bytes;
    pair.part_row = t.stride(1) * bytes;
    VDIT_CHECK(rows_are_own(full[i], pair.row_bytes), item("scatter_rows", "full", i),
               " has rows that share memory; pass a tensor whose rows lie apart");
  }
  for (size_t i = 0; i < full.size(); ++i) {
    const Footprint to(full[i]);
    for (size_t j = 0; j < full.size(); ++j) {
      VDIT_CHECK(!to.meets(Footprint(part[j])), "scatter_rows: part[", j, "] overlaps full[", i,
                 "]; pass a copy of it");
      VDIT_CHECK(j >= i || !to.meets(Footprint(full[j])), "scatter_rows: full[", i, "] and full[", j,
                 "] are the same memory; each needs its own");
    }
    VDIT_CHECK(!gate || !to.meets(Footprint(*gate)), "scatter_rows: gate overlaps full[", i, "]; pass a copy of it");
  }
  p.add = add ? 1 : 0;
  if (add || gate) point_at_gate(p, full, gate);
  return p;
}

void scatter_rows_cpu(const Tensors& full, const Tensors& part, const Tensor& rows, const Maybe& count,
                      const Maybe& gate, bool add) {
  const RowsParams p = prepare_scatter(full, part, rows, count, gate, add);
  if (is_empty(p)) return;
  const int64_t lists = p.rows_batch == 0 && p.count_batch == 0 ? 1 : p.batch;
  for (int64_t b = 0; b < lists; ++b) {
    const int32_t repeated = cpu_repeated_row(p, b);
    check_range(repeated != kRowOutside, "scatter_rows", p);  // before anything is written
    VDIT_CHECK(repeated < 0, "scatter_rows: rows names row ", repeated, " of item ", b,
               " twice; the rows of an item must be distinct");
  }
  over_rows(p, "scatter_rows", cpu_scatter_rows);
}

#ifdef VDIT_CUDA
Tensors gather_rows_cuda(const Tensors& full, const Tensor& rows, const Maybe& count) {
  VDIT_CHECK(!full.empty(), "gather_rows: no tensors; pass at least one");
  const int32_t device = full[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensors part;
  const RowsParams p = prepare_gather(full, rows, count, part);
  if (!is_empty(p)) check_cuda(cuda_gather_rows(p, current_cuda_stream(device)), "gather_rows");
  return part;
}

void scatter_rows_cuda(const Tensors& full, const Tensors& part, const Tensor& rows, const Maybe& count,
                       const Maybe& gate, bool add) {
  VDIT_CHECK(!full.empty(), "scatter_rows: no tensors; pass at least one");
  const int32_t device = full[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const RowsParams p = prepare_scatter(full, part, rows, count, gate, add);
  if (!is_empty(p)) check_cuda(cuda_scatter_rows(p, current_cuda_stream(device)), "scatter_rows");
}
#else
Tensors gather_rows_cuda(const Tensors&, const Tensor&, const Maybe&) { fail_without_cuda("gather_rows"); }
void scatter_rows_cuda(const Tensors&, const Tensors&, const Tensor&, const Maybe&, const Maybe&, bool) {
  fail_without_cuda("scatter_rows");
}
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) {
  m.impl("gather_rows", TORCH_BOX(&vdit::gather_rows_cpu));
  m.impl("scatter_rows", TORCH_BOX(&vdit::scatter_rows_cpu));
}
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) {
  m.impl("gather_rows", TORCH_BOX(&vdit::gather_rows_cuda));
  m.impl("scatter_rows", TORCH_BOX(&vdit::scatter_rows_cuda));
}

#include "cpu/combine_rows.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>

#include "ops/common.h"

namespace vdit {
namespace {

constexpr int64_t kMaxDim = int64_t(1) << 29;  // a row's bytes in fp32 stay below 2^31

using Optional = std::optional<Tensor>;

void check_place(const Tensor& t, const char* name, const Tensor& rows) {
  VDIT_CHECK(same_device(t, rows), "combine_rows: ", name, " is on ", device_text(t), " but rows is on ",
             device_text(rows), "; move them to one device");
}

// A [count, C] tensor of the call's dtype: where it begins and how far its rows are apart.
const void* matrix(const Tensor& t, const char* name, const Tensor& rows, int64_t count, int64_t& stride) {
  VDIT_CHECK(t.dim() == 2 && t.size(0) == count && t.size(1) == rows.size(1), "combine_rows: ", name, " has shape ",
             shape_text(t), "; expected [", count, ", ", rows.size(1), "]");
  VDIT_CHECK(t.scalar_type() == rows.scalar_type(), "combine_rows: ", name, " is ", dtype_text(t.scalar_type()),
             " but rows is ", dtype_text(rows.scalar_type()), "; convert them to one dtype");
  VDIT_CHECK(t.size(1) <= 1 || t.stride(1) == 1, "combine_rows: ", name, " has stride ", t.stride(1),
             " in its last dimension; it must be contiguous there: call .contiguous()");
  check_place(t, name, rows);
  stride = t.stride(0);
  return t.const_data_ptr();
}

// Checks everything, allocates the result and points the parameters at it.
CombineRowsParams prepare(const Tensor& rows, const Tensor& slots, const Optional& weights, const Optional& base,
                          const Optional& residual, const Optional& gate, Tensor& out) {
  VDIT_CHECK(rows.dim() == 2 && rows.size(1) < kMaxDim, "combine_rows: rows has shape ", shape_text(rows),
             "; expected [rows, dim], dim below ", kMaxDim);
  VDIT_CHECK(slots.dim() == 2 && slots.size(1) >= 1 && slots.size(1) <= kCombineMaxSlots,
             "combine_rows: slots has shape ", shape_text(slots), "; expected [rows of the result, 1 to ",
             kCombineMaxSlots, "]");
  VDIT_CHECK(slots.scalar_type() == ScalarType::Int, "combine_rows: slots is ", dtype_text(slots.scalar_type()),
             "; convert it to int32");
  VDIT_CHECK(slots.is_contiguous(), "combine_rows: slots must be contiguous: call .contiguous()");
  check_place(slots, "slots", rows);
  const int64_t n = slots.size(0);
  CombineRowsParams p{};
  p.rows = n;
  p.sources = rows.size(0);
  p.rows_per_gate = 1;
  p.dim = int32_t(rows.size(1));
  p.slots_per_row = int32_t(slots.size(1));
  p.dtype = kernel_dtype(rows, "combine_rows: rows");
  p.source = matrix(rows, "rows", rows, p.sources, p.source_stride);
  p.slots = slots.const_data_ptr<int32_t>();
  if (weights) {
    VDIT_CHECK(weights->scalar_type() == ScalarType::Float, "combine_rows: weights is ",
               dtype_text(weights->scalar_type()), "; convert it to float32");
    VDIT_CHECK(weights->dim() == 2 && weights->size(0) == n && weights->size(1) == slots.size(1),
               "combine_rows: weights has shape ", shape_text(*weights), "; expected that of slots, ",
               shape_text(slots));
    VDIT_CHECK(weights->is_contiguous(), "combine_rows: weights must be contiguous: call .contiguous()");
    check_place(*weights, "weights", rows);
    p.weights = weights->const_data_ptr<float>();
  }
  if (base) p.base = matrix(*base, "base", rows, n, p.base_stride);
  if (residual) p.residual = matrix(*residual, "residual", rows, n, p.residual_stride);
  if (gate) {
    const int64_t gates = gate->dim() == 2 ? gate->size(0) : 0;
    VDIT_CHECK(n == 0 || (gates >= 1 && n % gates == 0), "combine_rows: gate has shape ", shape_text(*gate),
               "; expected one row for each of equal parts of the ", n, " rows");
    p.gate = matrix(*gate, "gate", rows, gates, p.gate_stride);
    p.rows_per_gate = std::max<int64_t>(1, gates == 0 ? 1 : n / gates);
  }
  out = torch::stable::new_empty(rows, {n, rows.size(1)});
  p.out = out.mutable_data_ptr();
  return p;
}

// On a CPU: no slot beyond the rows. Negative ones say that there is none.
void check_slots(const CombineRowsParams& p) {
  for (int64_t i = 0; i < p.rows * p.slots_per_row; ++i)
    VDIT_CHECK(p.slots[i] < p.sources, "combine_rows: slot ", p.slots[i], " of row ", i / p.slots_per_row,
               " is outside the ", p.sources, " rows");
}

Tensor combine_rows_cpu(const Tensor& rows, const Tensor& slots, const Optional& weights, const Optional& base,
                        const Optional& residual, const Optional& gate) {
  Tensor out;
  const CombineRowsParams p = prepare(rows, slots, weights, base, residual, gate, out);
  check_slots(p);
  constexpr int64_t kElementsPerTask = 1 << 15;
  const int64_t operands = p.slots_per_row + 3;
  torch::stable::parallel_for(0, p.rows,
                              std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, operands * p.dim)),
                              [&p](int64_t first, int64_t last) { cpu_combine_rows(p, first, last); });
  return out;
}

#ifdef VDIT_CUDA
Tensor combine_rows_cuda(const Tensor& rows, const Tensor& slots, const Optional& weights, const Optional& base,
                         const Optional& residual, const Optional& gate) {
  const int32_t device = rows.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out;
  const CombineRowsParams p = prepare(rows, slots, weights, base, residual, gate, out);
  check_cuda(cuda_combine_rows(p, current_cuda_stream(device)), "combine_rows");
  return out;
}
#else
Tensor combine_rows_cuda(const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&,
                         const Optional&) {
  fail_without_cuda("combine_rows");
}
#endif

}  // namespace
}  // namespace vdit

STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CPU, m) { m.impl("combine_rows", TORCH_BOX(&vdit::combine_rows_cpu)); }
STABLE_TORCH_LIBRARY_IMPL(vdit_fast, CUDA, m) { m.impl("combine_rows", TORCH_BOX(&vdit::combine_rows_cuda)); }

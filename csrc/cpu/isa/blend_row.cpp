#include "cpu/isa/lanes16.h"
#include "cpu/rows.h"

namespace VDIT_NS {
namespace {

template <class T, class G>
void blend(const vdit::RowBlend& r) {
  T* x = static_cast<T*>(r.x);
  const T* y = static_cast<const T*>(r.y);
  const G* gate = static_cast<const G*>(r.gate);
  const vf one = splat(gate != nullptr ? to_float(gate[0]) : 1.0f);
  const bool per_channel = gate != nullptr && r.channel != 0;
  int64_t i = 0;
  for (; i + VL <= r.width; i += VL) {
    const vf v = load_lanes(y + i) * (per_channel ? load_lanes(gate + i) : one);
    store_lanes(x + i, r.add != 0 ? load_lanes(x + i) + v : v);
  }
  const int rest = int(r.width - i);
  if (rest == 0) return;
  const vf v = load_some(y + i, rest) * (per_channel ? load_some(gate + i, rest) : one);
  store_some(x + i, r.add != 0 ? load_some(x + i, rest) + v : v, rest);
}

template <class T>
void with_gate(const vdit::RowBlend& r) {
  return r.gate == nullptr || r.gate_dtype != vdit::DType::f32 ? blend<T, T>(r) : blend<T, float>(r);
}

}  // namespace

void blend_row(const vdit::RowBlend& r) {
  switch (r.dtype) {
    case vdit::DType::f32: return with_gate<float>(r);
    case vdit::DType::f16: return with_gate<f16>(r);
    case vdit::DType::bf16: return with_gate<bf16>(r);
  }
}

}  // namespace VDIT_NS

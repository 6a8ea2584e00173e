#include "cpu/linear_attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/features.h"

namespace vdit_generic {
extern const vdit::LinearKernels linear_kernels;
}
#if defined(VDIT_X86)
namespace vdit_avx2 {
extern const vdit::LinearKernels linear_kernels;
}
namespace vdit_avx512 {
extern const vdit::LinearKernels linear_kernels;
}
#endif

namespace vdit {

namespace {

const LinearKernels& linear_kernels() {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::linear_kernels;
    case Isa::avx2: return vdit_avx2::linear_kernels;
#endif
    default: return vdit_generic::linear_kernels;
  }
}

// The panels of one weight, or of one per head.
struct PackedWeight {
  std::vector<float> memory;
  int64_t stride = 0;

  PackedWeight(const LinearWeight& w, int64_t heads, int dim, const ParallelFor& parallel) {
    if (w.data == nullptr) return;
    const int64_t floats = linear_round(dim) * dim, count = w.head_stride == 0 ? 1 : heads;
    stride = w.head_stride == 0 ? 0 : floats;
    memory.resize(static_cast<size_t>(count * floats));
    parallel(count, [&](int64_t h) { linear_kernels().pack_weight(w, h, dim, memory.data() + h * floats); });
  }
  const float* head(int64_t h) const { return memory.empty() ? nullptr : memory.data() + h * stride; }
};

std::unique_ptr<float[]> floats(int64_t n) { return std::unique_ptr<float[]>(new float[static_cast<size_t>(n)]); }

}  // namespace

// The parts of a sequence follow from its length alone, so that a result depends neither on the number of threads nor
// on the rest of the batch. The first part of a head is added to by the others, in their order.
void linear_state_cpu(const LinearStateParams& p, const int64_t* kv_len, const ParallelFor& parallel) {
  const int64_t count = feature_count(p.map, p.dim), row = linear_round(p.dim_v);
  const int64_t sums = linear_round(count) + kLinearAlign, part_floats = count * row + sums;
  const int64_t parts = std::clamp<int64_t>(p.length / kLinearPart, 1, kLinearSplits);
  const int64_t heads = int64_t{p.batch} * p.heads;
  const PackedWeight weight(p.weight, p.heads, p.dim, parallel);
  const std::unique_ptr<float[]> memory = floats(heads * parts * part_floats);
  parallel(heads * parts, [&](int64_t n) {
    const int64_t batch = n / parts / p.heads, head = n / parts % p.heads, part = n % parts;
    const int64_t length = kv_len == nullptr ? p.length : kv_len[batch];
    const int64_t first = std::min(length, p.length * part / parts), last = p.length * (part + 1) / parts;
    float* to = memory.get() + n * part_floats;
    std::fill_n(to, part_floats, 0.f);
    const std::unique_ptr<float[]> scratch = floats(linear_scratch(p.dim, count, p.dim_v));
    linear_kernels().state(p, batch, head, weight.head(head), first, std::min(length, last), to, to + count * row,
                           scratch.get());
  });
  parallel(heads, [&](int64_t n) {
    float* sum = memory.get() + n * parts * part_floats;
    for (int64_t part = 1; part < parts; ++part) {
      const float* from = sum + part * part_floats;
      for (int64_t i = 0; i < part_floats; ++i) sum[i] += from[i];
    }
    float* to = p.state + n * count * (p.dim_v + 1);
    for (int64_t f = 0; f < count; ++f, to += p.dim_v + 1) {
      std::copy_n(sum + f * row, p.dim_v, to);
      to[p.dim_v] = sum[count * row + f];
    }
  });
}

void linear_readout_cpu(const LinearReadoutParams& p, const ParallelFor& parallel) {
  const int64_t count = feature_count(p.map, p.dim), state = count * (p.dim_v + 1);
  const int64_t sums = linear_round(count), packed = count * linear_round(p.dim_v) + sums;
  const int64_t states = int64_t{p.batch} * p.kv_heads, group = p.heads / p.kv_heads;
  const int64_t blocks = (int64_t{p.length} + kLinearBlock - 1) / kLinearBlock;
  const PackedWeight weight(p.weight, p.heads, p.dim, parallel);
  const std::unique_ptr<float[]> memory = floats(states * packed);
  parallel(states, [&](int64_t n) {
    float* to = memory.get() + n * packed;
    linear_kernels().pack_state(p.state + n * state, int(count), p.dim_v, to + sums, to);
  });
  parallel(int64_t{p.batch} * p.heads * blocks, [&](int64_t n) {
    const int64_t batch = n / blocks / p.heads, head = n / blocks % p.heads, first = n % blocks * kLinearBlock;
    const float* from = memory.get() + (batch * p.kv_heads + head / group) * packed;
    const std::unique_ptr<float[]> scratch = floats(linear_scratch(p.dim, count, p.dim_v));
    linear_kernels().readout(p, batch, head, weight.head(head), from + sums, from, first,
                             std::min<int64_t>(p.length, first + kLinearBlock), scratch.get());
  });
}

}  // namespace vdit

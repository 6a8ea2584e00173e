#include "cpu/counting_sort.h"

#include <algorithm>

namespace vdit {

void cpu_counting_sort(const CountingSortParams& p, int64_t first, int64_t last, int32_t* cursor) {
  for (int64_t n = first; n < last; ++n) {
    const int32_t* labels = static_cast<const int32_t*>(p.labels.data) + n / p.heads * p.labels.batch_stride +
                            n % p.heads * p.labels.head_stride;
    auto label = [&](int32_t i) { return std::clamp(labels[i * p.labels.stride], 0, p.classes - 1); };
    int32_t* counts = p.counts + n * p.classes;
    std::fill(counts, counts + p.classes, 0);
    for (int32_t i = 0; i < p.tokens; ++i) ++counts[label(i)];
    int32_t begin = 0;
    for (int32_t c = 0; c < p.classes; ++c) {
      cursor[c] = begin;
      begin += counts[c];
    }
    int32_t* order = p.order + n * p.tokens;
    for (int32_t i = 0; i < p.tokens; ++i) order[cursor[label(i)]++] = i;
  }
}

}  // namespace vdit

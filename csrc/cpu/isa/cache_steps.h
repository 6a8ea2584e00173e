// How the feature cache's kernels walk over rows.
#pragma once
#include "cpu/isa/table_rows.h"
#include "kernels/cache/cache.h"

namespace VDIT_NS {

template <int N>
struct Vectors {
  static constexpr int value = N;
};

// f(first column, All or Some, how many vectors); f must be inlined: what it captures would be read again for every
// step.
template <class F>
static inline void steps(int dim, F f) {
  int i = 0;
  for (; i + 4 * VL <= dim; i += 4 * VL) f(i, All{}, Vectors<4>{});
  for (; i + VL <= dim; i += VL) f(i, All{}, Vectors<1>{});
  if (i < dim) f(i, Some{dim - i}, Vectors<1>{});
}

// Hardware prefetchers stop at the end of a page, and its successor's address is yet to be translated: once per page of
// T, the first line of a later one is asked for. One line, 16 KB ahead: a tenth in fp32, where a second line, or one
// per half page, gave part of it back (measured, AMD EPYC). Addresses beyond a tensor are never read, and do no harm.
constexpr uint64_t kPage = 4096, kAhead = 4 * kPage;
template <class T>
static inline bool begins_page(int64_t element) {
  return (uint64_t(element) & (kPage / sizeof(T) - 1)) < 4 * VL;
}
static inline void ask_ahead(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAhead); }

// Where row `at` begins and ends.
struct Place {
  int64_t b, n, offset;
  int dim;

  template <class Params>
  Place(const Params& p, int64_t at) : b(at / p.tokens), n(at % p.tokens), offset(at * p.dim) {
    dim = p.total - offset < p.dim ? int(p.total - offset) : p.dim;
  }
  template <class T>
  const T* row(const vdit::AdaLNRows& t) const {
    if (t.data == nullptr) return nullptr;
    return static_cast<const T*>(t.data) + b * t.batch_stride + n * t.token_stride;
  }
};

}  // namespace VDIT_NS

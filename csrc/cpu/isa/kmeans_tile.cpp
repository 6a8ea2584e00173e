// Nearest centroids of a tile of tokens: the register-blocked product of vec.h, with the minimum taken from the
// accumulators, so that no score is ever stored.
#include "cpu/isa/float16.h"
#include "cpu/isa/vec.h"
#include "cpu/kmeans.h"

namespace VDIT_NS {
namespace {

using vdit::DType;
using vdit::kKmeansTileTokens;
using vdit::KmeansPanels;
using vdit::KmeansParams;

constexpr int kGroupFloats = 4096;  // panels that pass over the whole tile before the next ones: half of an L1 cache

typedef int32_t vi_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));

template <class T>
void load_row(const void* data, int64_t offset, int dim, float* to) {
  const T* from = static_cast<const T*>(data) + offset;
  for (int d = 0; d < dim; ++d) to[d] = to_float(from[d]);
}

template <class T>
float rounded(float x) {
  T y;
  from_float(x, y);
  return to_float(y);
}

template <class T>
void pack(const KmeansParams& p, const KmeansPanels& to, int64_t first, int64_t last) {
  for (int64_t n = first; n < last; ++n) {
    const int64_t head = n / to.panels % p.heads, batch = n / to.panels / p.heads, begin = n % to.panels * NR;
    float* values = to.values + n * p.dim * NR;
    float* norms = to.norms + n * NR;
    const float* from = static_cast<const float*>(p.centre.data) + batch * p.centre.batch_stride +
                        head * p.centre.head_stride + begin * p.centre.row_stride;
    for (int j = 0; j < NR; ++j) {
      const bool exists = begin + j < p.centres;
      float norm = exists ? 0.f : kInf;
      for (int d = 0; d < p.dim; ++d) {
        const float v = exists ? rounded<T>(from[j * p.centre.row_stride + d]) : 0.f;
        values[int64_t{d} * NR + j] = v;
        norm += v * v;
      }
      norms[j] = norm;
    }
  }
}

// Every lane keeps the smallest score of its centroids so far, and the lowest of their indices; a NaN never wins.
template <int M>
inline void update_nearest(int64_t dim, const float* x, const float* panel, const float* norms, int32_t first,
                           float* best, int32_t* label) {
  vf acc[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) acc[i][0] = acc[i][1] = vf{};
  for (int64_t d = 0; d < dim; ++d) {
    const vf c0 = load(panel + d * NR), c1 = load(panel + d * NR + VL);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const vf s = splat(x[i * dim + d]);
      acc[i][0] += s * c0;
      acc[i][1] += s * c1;
    }
  }
  const vf norm0 = load(norms), norm1 = load(norms + VL);
  vi index0;
  for (int i = 0; i < VL; ++i) index0[i] = first + i;
  const vi index1 = index0 + VL;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    vf low = load(best + i * VL);
    vi at = *reinterpret_cast<const vi_u*>(label + i * VL);
    const vf s0 = norm0 - 2.f * acc[i][0], s1 = norm1 - 2.f * acc[i][1];
    const vi less0 = s0 < low;
    low = less0 ? s0 : low;
    at = less0 ? index0 : at;
    const vi less1 = s1 < low;
    low = less1 ? s1 : low;
    at = less1 ? index1 : at;
    store(best + i * VL, low);
    *reinterpret_cast<vi_u*>(label + i * VL) = at;
  }
}

template <int M>
void update_tail(int m, int64_t dim, const float* x, const float* panel, const float* norms, int32_t first, float* best,
                 int32_t* label) {
  if constexpr (M > 0) {
    if (m == M) return update_nearest<M>(dim, x, panel, norms, first, best, label);
    update_tail<M - 1>(m, dim, x, panel, norms, first, best, label);
  }
}

template <class T>
void assign(const KmeansParams& p, const KmeansPanels& from, int64_t first, int64_t last) {
  alignas(64) float x[kKmeansTileTokens * vdit::kKmeansMaxDim], best[kKmeansTileTokens * VL];
  alignas(64) int32_t label[kKmeansTileTokens * VL];
  const int64_t tiles = (int64_t{p.tokens} + kKmeansTileTokens - 1) / kKmeansTileTokens;
  const int group = kGroupFloats / (NR * p.dim) > 1 ? kGroupFloats / (NR * p.dim) : 1;
  for (int64_t n = first; n < last; ++n) {
    const int64_t head = n / tiles % p.heads, batch = n / tiles / p.heads, begin = n % tiles * kKmeansTileTokens;
    const int rows = int(p.tokens - begin < kKmeansTileTokens ? p.tokens - begin : kKmeansTileTokens);
    const int64_t at = batch * p.x.batch_stride + head * p.x.head_stride + begin * p.x.row_stride;
    for (int i = 0; i < rows; ++i) load_row<T>(p.x.data, at + i * p.x.row_stride, p.dim, x + i * p.dim);
    for (int i = 0; i < rows * VL; ++i) {
      best[i] = kInf;
      label[i] = 0;
    }
    const int64_t panel = (batch * p.heads + head) * from.panels;
    for (int g = 0; g < from.panels; g += group) {
      const int end = from.panels - g < group ? from.panels : g + group;
      for (int i = 0; i < rows; i += MR) {
        for (int c = g; c < end; ++c) {
          const float* values = from.values + (panel + c) * p.dim * NR;
          const float* norms = from.norms + (panel + c) * NR;
          float* row_best = best + i * VL;
          int32_t* row_label = label + i * VL;
          if (rows - i >= MR) {
            update_nearest<MR>(p.dim, x + i * p.dim, values, norms, c * NR, row_best, row_label);
          } else {
            update_tail<MR - 1>(rows - i, p.dim, x + i * p.dim, values, norms, c * NR, row_best, row_label);
          }
        }
      }
    }
    int32_t* to = p.labels + (batch * p.heads + head) * p.tokens + begin;
    for (int i = 0; i < rows; ++i) {
      float low = best[i * VL];
      int32_t nearest = label[i * VL];
      for (int j = 1; j < VL; ++j) {
        const float s = best[i * VL + j];
        const int32_t c = label[i * VL + j];
        if (s < low || (s == low && c < nearest)) {
          low = s;
          nearest = c;
        }
      }
      to[i] = nearest;
    }
  }
}

void pack_panels(const KmeansParams& p, const KmeansPanels& to, int64_t first, int64_t last) {
  switch (p.dtype) {
    case DType::f32: return pack<float>(p, to, first, last);
    case DType::f16: return pack<f16>(p, to, first, last);
    case DType::bf16: return pack<bf16>(p, to, first, last);
  }
}

void assign_tiles(const KmeansParams& p, const KmeansPanels& from, int64_t first, int64_t last) {
  switch (p.dtype) {
    case DType::f32: return assign<float>(p, from, first, last);
    case DType::f16: return assign<f16>(p, from, first, last);
    case DType::bf16: return assign<bf16>(p, from, first, last);
  }
}

}  // namespace

extern const vdit::KmeansKernels kmeans_kernels;
const vdit::KmeansKernels kmeans_kernels = {NR, pack_panels, assign_tiles};

}  // namespace VDIT_NS

// CPU twin of kernels/select/kmeans.h: centroids are packed once, then tiles of tokens find their nearest.
#pragma once
#include "kernels/select/kmeans.h"

namespace vdit {

constexpr int kKmeansTileTokens = 96;  // a multiple of every micro-kernel height (4, 6, 12)

// Panels of `width` centroids: values [B * H][panels][D][width] in fp32, squared norms [B * H][panels][width], +inf
// where there is no centroid.
struct KmeansPanels {
  float *values, *norms;
  int32_t width, panels;  // panels of a head
};

// One per instruction set. Both are safe to call from many threads and allocate nothing.
struct KmeansKernels {
  int32_t panel_width;
  // Panels [first, last) of B * H * panels.
  void (*pack)(const KmeansParams& p, const KmeansPanels& to, int64_t first, int64_t last);
  // Tiles [first, last) of B * H * ceil(N / kKmeansTileTokens).
  void (*assign)(const KmeansParams& p, const KmeansPanels& from, int64_t first, int64_t last);
};

const KmeansKernels& kmeans_kernels();  // the best set for this processor

}  // namespace vdit

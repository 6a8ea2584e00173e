// Rows of fp32, fp16 or bf16 to and from fp32, keys into panels; also the table of this build's kernels.
#include "cpu/isa/lanes16.h"
#include "cpu/isa/panel.h"
#include "cpu/isa/stage.h"

namespace VDIT_NS {

void attention_forward_tile(const TileShape&, const float*, const vdit::KeyValues&, const PanelRef*, int,
                            const int32_t*, float*, float*, float*, float*);
void attention_backward_tile(const TileShape&, const float*, const float*, const float*, const float*,
                             const vdit::KeyValues&, const PanelRef*, int, const int32_t*, float*, float*, float*,
                             float*);
void score_lse_tile(const vdit::FoldedTile&, float*, float*, float*);
void block_mass_tile(const vdit::FoldedTile&, const float*, const vdit::RowGroup*, int, int64_t, float*);
void softmax_mass_tile(const vdit::FoldedTile&, const vdit::RowGroup*, int, int64_t, float*, float*);

using vdit::DType;

template <class T>
static void load_typed(const void* src, int64_t stride, int n, float scale, float* dst) {
  const T* s = static_cast<const T*>(src);
  int i = 0;
  if (stride == 1)
    for (; i + VL <= n; i += VL) store(dst + i, load_lanes(s + i) * scale);
  for (; i < n; ++i) dst[i] = to_float(s[i * stride]) * scale;
}

template <class T>
static void store_typed(const float* src, int n, void* dst, int64_t stride) {
  T* d = static_cast<T*>(dst);
  int i = 0;
  if (stride == 1)
    for (; i + VL <= n; i += VL) store_lanes(d + i, load(src + i));
  for (; i < n; ++i) from_float(src[i], d[i * stride]);
}

static void load_row(const void* src, DType dtype, int64_t stride, int n, float scale, float* dst) {
  switch (dtype) {
    case DType::f32: return load_typed<float>(src, stride, n, scale, dst);
    case DType::f16: return load_typed<f16>(src, stride, n, scale, dst);
    case DType::bf16: return load_typed<bf16>(src, stride, n, scale, dst);
  }
}

static void store_row(const float* src, int n, void* dst, DType dtype, int64_t stride) {
  switch (dtype) {
    case DType::f32: return store_typed<float>(src, n, dst, stride);
    case DType::f16: return store_typed<f16>(src, n, dst, stride);
    case DType::bf16: return store_typed<bf16>(src, n, dst, stride);
  }
}

static void pack_panel(const void* const* rows, DType dtype, int64_t stride, int head_dim, float* panel) {
  switch (dtype) {
    case DType::f32: return pack_rows<float>(rows, stride, head_dim, panel);
    case DType::f16: return pack_rows<f16>(rows, stride, head_dim, panel);
    case DType::bf16: return pack_rows<bf16>(rows, stride, head_dim, panel);
  }
}

extern const vdit::TileKernels kernels;
const vdit::TileKernels kernels = {NR,
                                   load_row,
                                   store_row,
                                   pack_panel,
                                   attention_forward_tile,
                                   attention_backward_tile,
                                   score_lse_tile,
                                   block_mass_tile,
                                   softmax_mass_tile};

}  // namespace VDIT_NS

// CuTe's layouts as an independent oracle: operands are laid out, described and read back by CuTe on the host, the
// emulator multiplies, and the result is compared with plain loops. Needs the headers of CUTLASS and CUDA.
#define CUTE_CAST_SMEM_PTR_TO_UINT_SUPPORTED 0
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "emulator/harness.h"

namespace {

using namespace cute;
using SM90::GMMA::Major;
using Bf16 = cutlass::bfloat16_t;

constexpr int kBOffset = 65536;  // where B lies in shared memory
uint16_t matrix_a[64][16], matrix_b[256][16];
float exact[64][256];  // A B^T

void fill_matrices() {
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0, 1);
  for (auto& row : matrix_a)
    for (auto& x : row) x = emu::to_bf16(normal(generator));
  for (auto& row : matrix_b)
    for (auto& x : row) x = emu::to_bf16(normal(generator));
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < 256; ++n) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) sum += double(emu::from_bf16(matrix_a[m][k])) * emu::from_bf16(matrix_b[n][k]);
      exact[m][n] = float(sum);
    }
}

// Calling a swizzled layout as a function gives wrong offsets; its position-independent twin does not.
template <class Layout, class Matrix>
void place(Layout layout, unsigned char* smem, const Matrix& matrix, int rows) {
  const auto offset = as_position_independent_swizzle_layout(layout);
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < 16; ++k) memcpy(smem + 2 * offset(r, k), &matrix[r][k], 2);
}

struct Operands {
  uint64_t desc_a, desc_b;
  bool transpose_a, transpose_b;
  float* out;
};

template <class LayoutA, class LayoutB, int N>
void multiply(Operands p) {
  unsigned char* smem = emu::dyn_smem();
  const uint32_t base = emu::smem_u32(smem);
  if (emu::cur->linear == 0) {
    place(LayoutA{}, smem, matrix_a, 64);
    place(LayoutB{}, smem + kBOffset, matrix_b, N);
  }
  emu::bar_sync(0, 0, "__syncthreads");
  float d[N / 2];
  std::fill_n(d, N / 2, 1.f);
  emu::wgmma_fence();
  emu::wgmma(d, N, nullptr, p.desc_a | base >> 4, p.desc_b | (base + kBOffset) >> 4, 0, p.transpose_a, p.transpose_b,
             emu::DT::BF16);
  emu::wgmma_commit();
  emu::wgmma_wait(0);
  const auto fragment = SM90::GMMA::CLayout_64xN<N>{};  // (thread, register) to m + 64 n
  for (int i = 0; i < N / 2; ++i) {
    const int mn = fragment(emu::cur->linear, i);
    p.out[mn % 64 * N + mn / 64] = d[i];
  }
}

// Largest difference from `exact`.
double error_of(const std::vector<float>& out, int rows, int columns) {
  double worst = 0;
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n)
      worst = std::max(worst, double(std::fabs(out[size_t(m) * columns + n] - exact[m][n])));
  return std::isfinite(worst) ? worst : 1e9;
}

template <Major MajorA, Major MajorB, int N, class AtomA, class AtomB>
double descriptors() {
  const auto layout_a = tile_to_shape(AtomA{}, Shape<Int<64>, Int<64>>{});
  const auto layout_b = tile_to_shape(AtomB{}, Shape<Int<N>, Int<64>>{});
  const auto a = make_tensor(make_smem_ptr(static_cast<Bf16*>(nullptr)), layout_a);
  const auto b = make_tensor(make_smem_ptr(static_cast<Bf16*>(nullptr)), layout_b);
  const auto a16 = local_tile(a, Shape<Int<64>, Int<16>>{}, make_coord(0, 0));
  const auto b16 = local_tile(b, Shape<Int<N>, Int<16>>{}, make_coord(0, 0));
  const uint64_t desc_a = SM90::GMMA::make_gmma_desc<MajorA>(a16).desc_;
  const uint64_t desc_b = SM90::GMMA::make_gmma_desc<MajorB>(b16).desc_;
  std::vector<float> out(64 * N, NAN);
  const Operands p{desc_a, desc_b, MajorA == Major::MN, MajorB == Major::MN, out.data()};
  emu::launch(multiply<decltype(layout_a), decltype(layout_b), N>, dim3(1), dim3(128), size_t(2 * kBOffset), p);
  return error_of(out, 64, N);
}

void warp_product(float* out) {
  using Traits = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
  const int lane = emu::cur->lane;
  alignas(4) uint16_t a[8], b[4];
  float d[4];
  const float zero[4] = {0, 0, 0, 0};
  for (int i = 0; i < 8; ++i) {
    const int at = typename Traits::ALayout{}(lane, i);
    a[i] = matrix_a[at % 16][at / 16];
  }
  for (int i = 0; i < 4; ++i) {
    const int at = typename Traits::BLayout{}(lane, i);
    b[i] = matrix_b[at % 8][at / 8];
  }
  uint32_t pairs_a[4], pairs_b[2];
  memcpy(pairs_a, a, sizeof a);
  memcpy(pairs_b, b, sizeof b);
  emu::mma_16816(d, pairs_a, pairs_b, zero, emu::DT::BF16);
  for (int i = 0; i < 4; ++i) {
    const int at = typename Traits::CLayout{}(lane, i);
    out[at % 16 * 8 + at / 16] = d[i];
  }
}

double warp_fragments() {
  std::vector<float> out(16 * 8, NAN);
  emu::launch(warp_product, dim3(1), dim3(32), size_t(0), out.data());
  return error_of(out, 16, 8);
}

void product_from_registers(uint64_t desc, float* out) {
  unsigned char* smem = emu::dyn_smem();
  if (emu::cur->linear == 0)
    place(tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<Bf16>{}, Shape<Int<64>, Int<64>>{}), smem, matrix_b, 64);
  emu::bar_sync(0, 0, "__syncthreads");
  alignas(4) uint16_t a[8];
  for (int i = 0; i < 8; ++i) {
    const int at = SM90::GMMA::ALayout_64x16{}(emu::cur->linear, i);
    a[i] = matrix_a[at % 64][at / 64];
  }
  uint32_t pairs[4];
  memcpy(pairs, a, sizeof a);
  float d[32];
  emu::wgmma_fence();
  emu::wgmma(d, 64, pairs, 0, desc | emu::smem_u32(smem) >> 4, 0, false, false, emu::DT::BF16);
  emu::wgmma_commit();
  emu::wgmma_wait(0);
  for (int i = 0; i < 32; ++i) {
    const int at = SM90::GMMA::CLayout_64xN<64>{}(emu::cur->linear, i);
    out[at % 64 * 64 + at / 64] = d[i];
  }
}

double register_fragments() {
  std::vector<float> out(64 * 64, NAN);
  const uint64_t desc = 1ull << 62 | 64ull << 32 | 1ull << 16;  // 128-byte swizzle, stride offset 1024
  emu::launch(product_from_registers, dim3(1), dim3(128), size_t(kBOffset), desc, out.data());
  return error_of(out, 64, 64);
}

template <class Traits>
void load_matrices(bool transpose, int* mismatches) {
  unsigned char* smem = emu::dyn_smem();
  if (emu::cur->linear == 0)
    for (int i = 0; i < 4 * 64; ++i) {
      const auto value = uint16_t(i);
      memcpy(smem + 2 * i, &value, 2);
    }
  emu::bar_sync(0, 0, "__syncthreads");
  const int lane = emu::cur->lane;
  uint32_t r[4];
  emu::ldmatrix(emu::smem_u32(smem) + lane * 16, r, 4, transpose);
  for (int i = 0; i < 8; ++i) {
    const int bit = typename Traits::DstLayout{}(lane, i * 16);
    const auto got = uint16_t(r[i / 2] >> (16 * (i % 2)));
    *mismatches += got != bit / 16;
  }
}

template <class Traits>
double matrix_loads(bool transpose) {
  int mismatches = 0;
  emu::launch(load_matrices<Traits>, dim3(1), dim3(32), size_t(4096), transpose, &mismatches);
  return mismatches;
}

using namespace SM90::GMMA;
constexpr Major kK = Major::K, kMN = Major::MN;

struct Comparison {
  const char* name;
  double (*run)();
};
const Comparison kComparisons[] = {
    {"K-SW128 x K-SW128, N 128", descriptors<kK, kK, 128, Layout_K_SW128_Atom<Bf16>, Layout_K_SW128_Atom<Bf16>>},
    {"K-SW64 x K-SW64, N 64", descriptors<kK, kK, 64, Layout_K_SW64_Atom<Bf16>, Layout_K_SW64_Atom<Bf16>>},
    {"K-SW32 x K-SW32, N 96", descriptors<kK, kK, 96, Layout_K_SW32_Atom<Bf16>, Layout_K_SW32_Atom<Bf16>>},
    {"K x K, N 128", descriptors<kK, kK, 128, Layout_K_INTER_Atom<Bf16>, Layout_K_INTER_Atom<Bf16>>},
    {"K-SW128 x MN-SW128, N 128", descriptors<kK, kMN, 128, Layout_K_SW128_Atom<Bf16>, Layout_MN_SW128_Atom<Bf16>>},
    {"K-SW128 x MN-SW128, N 256", descriptors<kK, kMN, 256, Layout_K_SW128_Atom<Bf16>, Layout_MN_SW128_Atom<Bf16>>},
    {"MN-SW128 x MN-SW64, N 64", descriptors<kMN, kMN, 64, Layout_MN_SW128_Atom<Bf16>, Layout_MN_SW64_Atom<Bf16>>},
    {"MN-SW64 x MN-SW32, N 128", descriptors<kMN, kMN, 128, Layout_MN_SW64_Atom<Bf16>, Layout_MN_SW32_Atom<Bf16>>},
    {"MN x MN, N 128", descriptors<kMN, kMN, 128, Layout_MN_INTER_Atom<Bf16>, Layout_MN_INTER_Atom<Bf16>>},
    {"mma.m16n8k16 fragments", warp_fragments},
    {"wgmma A from registers", register_fragments},
    {"ldmatrix", [] { return matrix_loads<Copy_Traits<SM75_U32x4_LDSM_N>>(false); }},
    {"ldmatrix transposed", [] { return matrix_loads<Copy_Traits<SM75_U16x8_LDSM_T>>(true); }},
};

}  // namespace

// Comparison number `index`: its name, and the largest error or the number of mismatches. 2 beyond the last one.
VDIT_EMU_EXPORT int vdit_emu_cute(int index, const char** name, double* worst, const emu::Policy* policy, char* error,
                                  size_t error_bytes) {
  if (index >= int(sizeof kComparisons / sizeof kComparisons[0])) return 2;
  *name = kComparisons[index].name;
  if (exact[0][0] == 0.f) fill_matrices();
  return emu::guarded_run(policy, error, error_bytes, [&] {
    *worst = kComparisons[index].run();
    return 0;
  });
}

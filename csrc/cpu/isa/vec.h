// Vectors of VDIT_VL floats and the register-blocked product. Compiled once per instruction set into namespace VDIT_NS;
// uses nothing from the standard library (see tile_kernels.h).
#pragma once

#include <cstdint>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace VDIT_NS {

constexpr int VL = VDIT_VL;
typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vf_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4)));

#if VDIT_VL == 16
constexpr int MR = 12;  // 12 x 2 accumulators of 32 registers
#elif VDIT_VL == 8
constexpr int MR = 6;  // 6 x 2 of 16
#else
constexpr int MR = 4;  // 4 x 2 of 16
#endif
constexpr int NR = 2 * VL;

constexpr float kInf = __builtin_inff();

static inline vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
static inline void store(float* p, vf v) { *reinterpret_cast<vf_u*>(p) = v; }
static inline vf splat(float x) { return x - vf{}; }
static inline vi splat_i(int32_t x) { return x - vi{}; }

// Lane-wise a > b ? a : b: a NaN in b is returned, one in a is not.
static inline vf max_or_second(vf a, vf b) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif VDIT_VL == 8 && defined(__AVX__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// Lane-wise a < b ? a : b: a NaN in b is returned, one in a is not.
static inline vf min_or_second(vf a, vf b) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif VDIT_VL == 8 && defined(__AVX__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

static inline bool any_greater(vf a, vf b) {
#if VDIT_VL == 16 && defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif VDIT_VL == 8 && defined(__AVX__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  for (int i = 0; i < VL; ++i)
    if (a[i] > b[i]) return true;
  return false;
#endif
}

static inline float reduce_max(vf v) {
  float m = v[0];
  for (int i = 1; i < VL; ++i) m = v[i] > m ? v[i] : m;
  return m;
}
static inline float reduce_sum(vf v) {
  float s = 0;
  for (int i = 0; i < VL; ++i) s += v[i];
  return s;
}

// 2^x for x <= about 1, relative error 2.3e-7 (minimax polynomial of degree 5); exactly 0 at -127 and below, so also
// for -inf. NaN stays NaN, whatever its payload (GPUs make 0x7fffffff).
static inline vf exp2_nonpositive(vf x) {
  const vf c = max_or_second(splat(-127.f), x);
  const vf r = c + 12582912.f;  // 1.5 * 2^23: the low bits of r are c rounded to an integer
  const vf f = c - (r - 12582912.f);
  vf p = splat(1.32764718e-3f);
  p = p * f + 9.67554154e-3f;
  p = p * f + 5.55071328e-2f;
  p = p * f + 2.40221197e-1f;
  p = p * f + 6.93146967e-1f;
  p = p * f + 1.0f;
  return (vf)((vi)p + (((vi)r << 23) & (vi)(c == c)));
}

// 2^x for every x: the bits of exp2_nonpositive are right up to 128, where they are those of inf.
static inline vf exp2_any(vf x) { return exp2_nonpositive(min_or_second(splat(128.f), x)); }

// c[M x NR] (+)= a * b. a: element (i, k) at a[i*a_row + k*a_col]; b: row k at b + k*b_row; c: rows c_row apart.
template <int M, bool ACC>
static inline void micro(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                         float* c, int64_t c_row) {
  vf acc[M][2];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    acc[i][0] = ACC ? load(c + i * c_row) : vf{};
    acc[i][1] = ACC ? load(c + i * c_row + VL) : vf{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    const vf b0 = load(b + k * b_row), b1 = load(b + k * b_row + VL);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const vf s = splat(a[i * a_row + k * a_col]);
      acc[i][0] += s * b0;
      acc[i][1] += s * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    store(c + i * c_row, acc[i][0]);
    store(c + i * c_row + VL, acc[i][1]);
  }
}

// A strip of m < MR rows.
template <int M, bool ACC>
static void micro_tail(int m, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b,
                       int64_t b_row, float* c, int64_t c_row) {
  if constexpr (M > 0) {
    if (m == M) return micro<M, ACC>(depth, a, a_row, a_col, b, b_row, c, c_row);
    micro_tail<M - 1, ACC>(m, depth, a, a_row, a_col, b, b_row, c, c_row);
  }
}

struct Nothing {
  void operator()() const {}
};

// c[rows x cols] (+)= a * b, cols a multiple of NR; b_panel is the distance of consecutive column panels of b.
// Rows outer, panels inner: the strip of a stays in L1 (measured 9 % faster than the reverse). `between` is called
// after every block of c.
template <bool ACC, bool A_COLUMNS = false, class Between = Nothing>
static inline void gemm(int rows, int cols, int64_t depth, const float* a, int64_t a_ld, const float* b, int64_t b_row,
                        int64_t b_panel, float* c, int64_t c_row, Between between = {}) {
  const int64_t a_row = A_COLUMNS ? 1 : a_ld, a_col = A_COLUMNS ? a_ld : 1;
  int i = 0;
  for (; i + MR <= rows; i += MR)
    for (int n = 0; n < cols; n += NR) {
      micro<MR, ACC>(depth, a + i * a_row, a_row, a_col, b + (n / NR) * b_panel, b_row, c + i * c_row + n, c_row);
      between();
    }
  if (i < rows)
    for (int n = 0; n < cols; n += NR) {
      micro_tail<MR - 1, ACC>(rows - i, depth, a + i * a_row, a_row, a_col, b + (n / NR) * b_panel, b_row,
                              c + i * c_row + n, c_row);
      between();
    }
}

}  // namespace VDIT_NS

// Keys into the layout of the products, NR at a time and transposed: one vector load brings a coordinate of many keys.
#pragma once
#include "cpu/isa/float16.h"
#include "cpu/isa/vec.h"

namespace VDIT_NS {

#if defined(__AVX2__)
// Four words of 32 bits of each of two keys. A word of bf16 keys is two neighbouring numbers: they take part in the
// transposition as one, which halves the shuffles.
template <class T>
constexpr int kPerWord = 1;
template <>
inline constexpr int kPerWord<bf16> = 2;

static inline __m256 words_of(const float* a, const float* b) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(a)), _mm_loadu_ps(b), 1);
}
static inline __m256 words_of(const bf16* a, const bf16* b) {
  return words_of(reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b));
}
static inline __m256 words_of(const f16* a, const f16* b) {
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a));
  return _mm256_cvtph_ps(_mm_unpacklo_epi64(low, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b))));
}

// A word of eight keys, of which `exist` leaves those that exist: one or two rows of a panel.
template <class T>
static inline void put_word(__m256d word, __m256i exist, float* panel) {
  const __m256i bits = _mm256_castpd_si256(word);
  if constexpr (kPerWord<T> == 1) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel), _mm256_and_si256(bits, exist));
  } else {
    const __m256i high = _mm256_slli_epi32(exist, 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel), _mm256_and_si256(_mm256_slli_epi32(bits, 16), high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(panel + NR), _mm256_and_si256(bits, high));
  }
}

// Eight keys, 8 columns of a panel, as far as their dimensions are whole words. `some`: a key that exists.
template <class T>
static void transpose_keys(const void* const* rows, const void* some, int end, float* panel) {
  const T* key[8];
  int32_t exist[8];
  for (int j = 0; j < 8; ++j) {
    key[j] = static_cast<const T*>(rows[j] != nullptr ? rows[j] : some);
    exist[j] = rows[j] != nullptr ? -1 : 0;
  }
  const __m256i mask = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(exist));
  constexpr int kRows = kPerWord<T> * NR;
  for (int d = 0; d < end; d += 4 * kPerWord<T>, panel += 4 * kRows) {
    const __m256 k04 = words_of(key[0] + d, key[4] + d), k15 = words_of(key[1] + d, key[5] + d);
    const __m256 k26 = words_of(key[2] + d, key[6] + d), k37 = words_of(key[3] + d, key[7] + d);
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(k04, k15));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(k26, k37));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(k04, k15));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(k26, k37));
    put_word<T>(_mm256_unpacklo_pd(low01, low23), mask, panel);
    put_word<T>(_mm256_unpackhi_pd(low01, low23), mask, panel + kRows);
    put_word<T>(_mm256_unpacklo_pd(high01, high23), mask, panel + 2 * kRows);
    put_word<T>(_mm256_unpackhi_pd(high01, high23), mask, panel + 3 * kRows);
  }
}
#endif

// NR rows into a panel, [head_dim][NR]; zeros where a row is null.
template <class T>
static void pack_rows(const void* const* rows, int64_t stride, int head_dim, float* panel) {
  int done = 0;
#if defined(__AVX2__)
  const void* some = nullptr;
  for (int j = 0; j < NR && some == nullptr; ++j) some = rows[j];
  if (stride == 1 && some != nullptr) {
    done = head_dim / (4 * kPerWord<T>)*(4 * kPerWord<T>);
    for (int j = 0; j < NR; j += 8) transpose_keys<T>(rows + j, some, done, panel + j);
  }
#endif
  for (int j = 0; j < NR; ++j) {
    const T* row = static_cast<const T*>(rows[j]);
    for (int d = done; d < head_dim; ++d) panel[d * NR + j] = row != nullptr ? to_float(row[d * stride]) : 0.f;
  }
}

}  // namespace VDIT_NS

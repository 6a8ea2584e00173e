// Short attention on tensor cores (mma m16n8k16, 16-bit inputs): all scores of 16 queries are in registers at once, so
// that the softmax needs no second pass; the output takes the place of the queries and leaves in 16-byte pieces.
#pragma once
#include "kernels/short/tile.h"

namespace vdit::gpu::short_attention {

// Whether any value of the staged rows is NaN or infinite. The same in every lane.
template <class T>
VD_DEV bool any_not_finite(const Args& a, uint32_t rows_at, int rows) {
  const uint32_t exponent = arch::pack<T>(INFINITY, INFINITY);
  bool found = false;
  for (int row = threadIdx.x % 32; row < rows; row += 32) {
    for (int chunk = 0; chunk < a.chunks; ++chunk) {
      const uint4 v = arch::lds128(rows_at + row * a.pitch + chunk * 16);
      VD_UNROLL for (int e = 0; e < 4; ++e) {
        const uint32_t bits = (e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w) & exponent;
        found |= (bits & 0xffffu) == (exponent & 0xffffu) || bits >> 16 == exponent >> 16;
      }
    }
  }
  return arch::vote_ballot(found) != 0;
}

// Scores of 16 staged queries to weights, packed as the left operand of the second product; returns 1 / sum of this
// lane's rows lane / 4 and lane / 4 + 8.
template <class T, int kSteps>
VD_DEV void weigh(const Args& a, const Item& item, uint32_t slice, uint32_t q, int first, uint32_t (&p)[kSteps][4],
                  float (&factor)[2]) {
  const int lane = threadIdx.x % 32;
  float s[2 * kSteps][4] = {};
  const uint32_t q_at = q + lane % 16 * a.pitch + lane / 16 * 16;
  const uint32_t k_at = slice + (lane / 16 * 8 + lane % 8) * a.pitch + lane / 8 % 2 * 16;
  for (int chunk = 0; chunk < a.chunks; chunk += 2) {
    uint32_t left[4];
    arch::ldsm4(q_at + chunk * 16, left);
    VD_UNROLL for (int n = 0; n < kSteps; ++n) {
      uint32_t right[4];
      arch::ldsm4(k_at + 16 * n * a.pitch + chunk * 16, right);
      arch::mma<T>(s[2 * n], left, right[0], right[1]);
      arch::mma<T>(s[2 * n + 1], left, right[2], right[3]);
    }
  }
  const float scale = a.p.scale * kLog2e;
  VD_UNROLL for (int r = 0; r < 2; ++r) {
    const int reads = keys_of_row(a, item, first + lane / 4 + 8 * r) - 2 * (lane % 4);
    float top = -INFINITY;
    VD_UNROLL for (int n = 0; n < 2 * kSteps; ++n) {
      VD_UNROLL for (int c = 0; c < 2; ++c) {
        float& x = s[n][2 * r + c];
        x = 8 * n + c < reads ? x * scale : -INFINITY;
        top = fmaxf(top, x);
      }
    }
    top = fmaxf(top, arch::shfl_xor_f(top, 1));
    top = fmaxf(top, arch::shfl_xor_f(top, 2));
    if (top == -INFINITY) top = 0.f;
    float sum = 0.f;
    VD_UNROLL for (int n = 0; n < 2 * kSteps; ++n) {
      VD_UNROLL for (int c = 2 * r; c < 2 * r + 2; ++c) {
        s[n][c] = arch::ex2(s[n][c] - top);
        sum += s[n][c];
      }
    }
    sum += arch::shfl_xor_f(sum, 1);
    sum += arch::shfl_xor_f(sum, 2);
    factor[r] = sum == 0.f ? 0.f : 1.f / sum;
  }
  VD_UNROLL for (int n = 0; n < kSteps; ++n) {
    VD_UNROLL for (int half = 0; half < 2; ++half) {
      const float (&x)[4] = s[2 * n + half];
      p[n][2 * half] = arch::pack<T>(x[0], x[1]);
      p[n][2 * half + 1] = arch::pack<T>(x[2], x[3]);
    }
  }
}

// 16 staged queries at `q`, of which `count` exist; the first is query `first`.
template <class T, int kSteps>
VD_DEV void matrix_rows(const Args& a, const Item& item, uint32_t slice, uint32_t q, int first, int count) {
  const int lane = threadIdx.x % 32;
  uint32_t p[kSteps][4];
  float factor[2];
  weigh<T, kSteps>(a, item, slice, q, first, p, factor);
  arch::cp_async_wait<0>();
  arch::syncwarp();  // the values have landed, and no lane reads the queries any more
  const uint32_t v_at = slice + a.values + lane % 16 * a.pitch + lane / 16 * 16;
  const uint32_t to = q + lane / 4 * a.pitch + lane % 4 * 4;
  for (int chunk = 0; chunk < a.chunks; chunk += 2) {
    float o[2][4] = {};
    VD_UNROLL for (int n = 0; n < kSteps; ++n) {
      uint32_t right[4];
      arch::ldsm4t(v_at + 16 * n * a.pitch + chunk * 16, right);
      arch::mma<T>(o[0], p[n], right[0], right[1]);
      arch::mma<T>(o[1], p[n], right[2], right[3]);
    }
    VD_UNROLL for (int half = 0; half < 2; ++half) {
      const uint32_t column = to + (chunk + half) * 16;
      arch::sts32(column, arch::pack<T>(o[half][0] * factor[0], o[half][1] * factor[0]));
      arch::sts32(column + 8 * a.pitch, arch::pack<T>(o[half][2] * factor[1], o[half][3] * factor[1]));
    }
  }
  arch::syncwarp();
  char* out = const_cast<char*>(static_cast<const char*>(a.p.out.data)) + row_offset(a.p.out, item, first) * 2;
  const int row_step = 32 / a.chunks, chunk_step = 32 % a.chunks;
  for (int row = lane / a.chunks, chunk = lane % a.chunks; row < count;) {
    if (chunk * 8 < a.p.dim)
      arch::stg128(out + row * a.p.out.stride[1] * 2 + chunk * 16, arch::lds128(q + row * a.pitch + chunk * 16));
    row += row_step;
    chunk += chunk_step;
    if (chunk >= a.chunks) chunk -= a.chunks, ++row;
  }
}

}  // namespace vdit::gpu::short_attention

// Selection of the largest entries of every row: a number of them, or as many as hold a share of the row's mass.
//
// Entries are ordered by value, NaN first, then downwards; equal ones (also -0 and 0) by index. Entry m of that order
// stays while m < at_least or, with by_mass, while the mass before it is at most p times the row's. Masses are integers
// of 2^-32 (negative: 0, at most 2^40), so that sums do not depend on their order: the same result on every device.
// A row of up to kMaxMassRow entries cannot overflow them.
#pragma once
#include <cstdint>

namespace vdit {

constexpr int64_t kMaxRow = INT32_MAX, kMaxMassRow = (int64_t(1) << 23) - 1;

struct SelectParams {
  const float* scores;  // [rows, n], contiguous
  uint8_t* keep;        // [rows, n], 0 or 1
  int64_t rows, n;      // n from 1 to kMaxRow; with by_mass, to kMaxMassRow
  int64_t at_least;     // clamped to [1, n]
  const void* k_rows;   // [rows] or null: replaces at_least
  int32_t k_bytes;      // 4 or 8 per entry
  bool by_mass;
  double p;  // in [0, 1]
};

// Launches on `stream` (a cudaStream_t) of the current device; returns 0 or the cudaError_t of the launch.
int cuda_select(const SelectParams& params, void* stream);

}  // namespace vdit

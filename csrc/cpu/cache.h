// CPU twin of kernels/cache/cache.h.
#pragma once
#include "kernels/cache/cache.h"

namespace vdit {

// Rows [first, last) of the B * N rows, numbered b * N + n. Safe to call from many threads.
void cpu_factor_update(const FactorUpdateParams& params, int64_t first, int64_t last);

// The same of factors in e4m3; `scratch`: a row of dim rounded up to 16 floats for every factor that is written, of
// this call's own.
void cpu_factor_update_e4m3(const FactorUpdateParams& params, int64_t first, int64_t last, float* scratch);

// Either kind of factors; `scratch`: with a gate, a row of dim rounded up to 16 floats per module, of this call's own.
// Indices must lie inside their tables.
void cpu_forecast_gate_add(const ForecastParams& params, int64_t first, int64_t last, float* scratch);

}  // namespace vdit

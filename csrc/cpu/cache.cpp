#include "cpu/cache.h"

#include "cpu/features.h"

namespace vdit_generic {
void factor_update_rows(const vdit::FactorUpdateParams& p, int64_t first, int64_t last);
void factor_update_e4m3_rows(const vdit::FactorUpdateParams& p, int64_t first, int64_t last, float* scratch);
void forecast_rows(const vdit::ForecastParams& p, int64_t first, int64_t last, float* scratch);
}  // namespace vdit_generic
#if defined(VDIT_X86)
namespace vdit_avx2 {
void factor_update_rows(const vdit::FactorUpdateParams& p, int64_t first, int64_t last);
void factor_update_e4m3_rows(const vdit::FactorUpdateParams& p, int64_t first, int64_t last, float* scratch);
void forecast_rows(const vdit::ForecastParams& p, int64_t first, int64_t last, float* scratch);
}  // namespace vdit_avx2
namespace vdit_avx512 {
void factor_update_rows(const vdit::FactorUpdateParams& p, int64_t first, int64_t last);
void factor_update_e4m3_rows(const vdit::FactorUpdateParams& p, int64_t first, int64_t last, float* scratch);
void forecast_rows(const vdit::ForecastParams& p, int64_t first, int64_t last, float* scratch);
}  // namespace vdit_avx512
#endif

namespace vdit {

void cpu_factor_update(const FactorUpdateParams& p, int64_t first, int64_t last) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::factor_update_rows(p, first, last);
    case Isa::avx2: return vdit_avx2::factor_update_rows(p, first, last);
#endif
    default: return vdit_generic::factor_update_rows(p, first, last);
  }
}

void cpu_factor_update_e4m3(const FactorUpdateParams& p, int64_t first, int64_t last, float* scratch) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::factor_update_e4m3_rows(p, first, last, scratch);
    case Isa::avx2: return vdit_avx2::factor_update_e4m3_rows(p, first, last, scratch);
#endif
    default: return vdit_generic::factor_update_e4m3_rows(p, first, last, scratch);
  }
}

void cpu_forecast_gate_add(const ForecastParams& p, int64_t first, int64_t last, float* scratch) {
  switch (chosen_isa()) {
#if defined(VDIT_X86)
    case Isa::avx512: return vdit_avx512::forecast_rows(p, first, last, scratch);
    case Isa::avx2: return vdit_avx2::forecast_rows(p, first, last, scratch);
#endif
    default: return vdit_generic::forecast_rows(p, first, last, scratch);
  }
}

}  // namespace vdit

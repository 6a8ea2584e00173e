#include "emulator/selftest/primitives.h"

#include "emulator/selftest/cases.h"

namespace vdit::selftest {
namespace {

// number: 0 rank, 1 bytes of the box, 2..5 coordinate of the load, 6..9 of the store, 10 swizzle, 11 bytes per element;
// in[1]: int64 dim[4], stride_bytes[3], box[4].
void run_tma(const Io& io) {
  const auto* shape = static_cast<const int64_t*>(io.in[1]);
  uint64_t dim[4], stride[3];
  uint32_t box[4];
  for (int i = 0; i < 4; ++i) dim[i] = uint64_t(shape[i]);
  for (int i = 0; i < 3; ++i) stride[i] = uint64_t(shape[4 + i]);
  for (int i = 0; i < 4; ++i) box[i] = uint32_t(shape[7 + i]);
  const int rank = int(io.number[0]), elem = int(io.number[11]);
  const auto swizzle = static_cast<arch::Swizzle>(io.number[10]);
  IoTma p{};
  p.io = io;
  arch::make_tensor_map(p.load, io.in[0], elem, rank, dim, stride, box, swizzle);
  if (rank == 4) arch::make_tensor_map(p.store, io.out[1], elem, rank, dim, stride, box, swizzle);
  arch::launch(tma, dim3(1), dim3(64), size_t(io.number[1]) + 1024, nullptr, p);
}

constexpr int kWgmmaSmem = 100 * 1024;
template <class T, int N, int TransposeA, int TransposeB, bool Registers>
constexpr auto run_wgmma = one_block<warpgroup_mma<T, N, TransposeA, TransposeB, Registers>, 128, kWgmmaSmem>;

#define WGMMA(type, tag, n)                                                \
  {"wgmma_" type "_" #n "_00", run_wgmma<arch::tag, n, 0, 0, false>},      \
      {"wgmma_" type "_" #n "_01", run_wgmma<arch::tag, n, 0, 1, false>},  \
      {"wgmma_" type "_" #n "_11", run_wgmma<arch::tag, n, 1, 1, false>},  \
      {"wgmma_" type "_" #n "_r0", run_wgmma<arch::tag, n, 0, 0, true>}, { \
    "wgmma_" type "_" #n "_r1", run_wgmma<arch::tag, n, 0, 1, true>        \
  }

const Case kCases[] = {
    {"numbers", one_block<numbers, 128, 0>},
    {"e4m3", one_block<e4m3, 128, 0>},
    {"global_widths", one_block<global_widths, 64, 0>},
    {"bits", one_block<bits, 128, 0>},
    {"shared_widths", one_block<shared_widths, 64, 2048>},
    {"collectives", one_block<collectives, 96, 0>},
    {"shared_counters", one_block<shared_counters, 96, 0>},
    {"named_barriers", one_block<named_barriers, 96, 0>},
    {"copies", one_block<copies, 32, 1536>},
    {"matrices", one_block<matrices, 32, 1024>},
    {"mma_bf16", one_block<warp_mma<arch::BF16>, 32, 0>},
    {"mma_f16", one_block<warp_mma<arch::F16>, 32, 0>},
    {"ring", one_block<ring, 96, 1024>},
    {"tma", run_tma},
    {"registers", one_block<registers, 384, 0>},
    WGMMA("bf16", BF16, 8),
    WGMMA("bf16", BF16, 64),
    WGMMA("bf16", BF16, 96),
    WGMMA("bf16", BF16, 128),
    WGMMA("bf16", BF16, 176),
    WGMMA("bf16", BF16, 256),
    WGMMA("f16", F16, 64),
    WGMMA("f16", F16, 128),
    {nullptr, nullptr},
};
}  // namespace

const Case* primitive_cases() { return kCases; }

}  // namespace vdit::selftest

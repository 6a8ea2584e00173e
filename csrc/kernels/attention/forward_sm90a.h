// Forward attention for Hopper: the kernel and its launch. The stages are described in forward_sm90a_stage.h.
#pragma once
#include "kernels/attention/forward_sm90a_consumer.h"
#include "kernels/attention/forward_sm90a_producer.h"
#include "kernels/attention/forward_sm90a_tma.h"

namespace vdit::gpu::sm90a {

template <class T, int kDim, Producer kProducer>
VD_KERNEL(kThreads, 1)
forward(const VD_GRID_CONST KernelParams kp) {
  using S = Smem<kDim>;
  const ForwardArgs& a = kp.args;
  const int splits = a.work.splits;
  const int64_t index = blockIdx.x / splits;
  const int split = blockIdx.x % splits;
  const Item item = locate(a.params, a.work, index);
  if (item.rows <= 0) return;

  VD_DYN_SMEM(raw);
  const uint32_t smem = (arch::smem_u32(raw) + 1023) & ~1023u;
  const Barriers bars = barriers<kDim>(smem);
  const bool alternate = alternates(item);
  if (threadIdx.x == 0) {
    const int consumers = alternate ? 4 : 8;  // warps that free a stage
    const int copies = kProducer == Producer::gather ? 128 : 32;
    arch::mbar_init(bars.q_full, 128);
    for (int i = 0; i < kStages; ++i) {
      arch::mbar_init(bars.k_full(i), copies + (kProducer == Producer::gather ? 4 : 1));
      arch::mbar_init(bars.v_full(i), copies + (kProducer == Producer::gather ? 0 : 1));
      arch::mbar_init(bars.k_empty(i), consumers);
      arch::mbar_init(bars.v_empty(i), consumers);
    }
    arch::fence_mbar_init();
  }
  arch::syncthreads();

  if (threadIdx.x < 128) {
    arch::setmaxnreg_dec<Registers<kProducer>::kProducing>();
    if constexpr (kProducer == Producer::gather) {
      produce_gather<kDim>(a.params, item, split, splits, smem, bars);
    } else {
      produce_tma<kDim>(kp.maps, a.params, item, split, splits, smem, bars);
    }
    return;
  }
  arch::setmaxnreg_inc<Registers<kProducer>::kConsuming>();
  const int group = threadIdx.x / 128 - 1;
  float o[kDim / 2];
  VD_UNROLL for (int i = 0; i < kDim / 2; ++i) o[i] = 0.f;
  Softmax f{{-INFINITY, -INFINITY}, {0.f, 0.f}, {1.f, 1.f}};
  consume<T, kDim>(kp, alternate, smem, bars, group, o, f);
  if (alternate) {
    merge_groups<kDim>(smem, group, o, f, kp.scale_log2);
    if (group == 1) return;
  }
  const int first = 64 * group + threadIdx.x % 128 / 32 * 16;  // of the warp's rows in the item
  if (splits > 1) {
    store_part<kDim>(a.params, a.work, item, index * splits + split, first, o, f, kp.scale_log2);
  } else {
    store_rows<T, kDim>(a, item, smem + S::kQ + 64 * 128 * group, first, group, o, f, kp.scale_log2);
  }
}

// Tensor maps of [batch, heads, rows, dim] with boxes of 128 .. 8 rows of 64 columns. False if TMA cannot address it.
inline bool make_maps(const AttentionParams& p, const Rows& rows, arch::TensorMap (&maps)[kBoxes]) {
  const uint64_t dim[4] = {uint64_t(p.dim), uint64_t(p.lk), uint64_t(p.kv_heads), uint64_t(p.batch)};
  const int64_t stride[3] = {rows.row_stride, rows.head_stride, rows.batch_stride};
  uint64_t bytes[3];
  for (int i = 0; i < 3; ++i) {
    bytes[i] = dim[i + 1] == 1 ? uint64_t(p.dim) * 2 : uint64_t(stride[i]) * 2;
    if (dim[i + 1] > 1 && (stride[i] <= 0 || stride[i] % 8 != 0 || bytes[i] >= uint64_t(1) << 40)) return false;
  }
  if (reinterpret_cast<uint64_t>(rows.data) % 16 != 0) return false;
  for (uint32_t i = 0; i < kBoxes; ++i) {
    const uint32_t box[4] = {64, 128u >> i, 1, 1};
    if (arch::make_tensor_map(maps[i], rows.data, 2, 4, dim, bytes, box) != 0) return false;
  }
  return true;
}

template <class T, int kDim>
int launch_forward(const ForwardArgs& args, void* stream) {
  const AttentionParams& p = args.params;
  KernelParams kp{};
  kp.args = args;
  kp.pre_scale = p.scale > 0 ? 1.f : p.scale < 0 ? -1.f : 0.f;
  kp.scale_log2 = p.scale == 0 ? 1.f : fabsf(p.scale) * 1.44269504088896340736f;
  const int64_t blocks = int64_t(args.work.capacity) * args.work.replicas * args.work.splits;
  if (blocks == 0) return 0;
  const bool boxes = p.plan.kv_order.data == nullptr && p.plan.mask_bits == nullptr && p.lk > 0 &&
                     make_maps(p, p.k, kp.maps.k) && make_maps(p, p.v, kp.maps.v);
  return arch::launch(boxes ? forward<T, kDim, Producer::tma> : forward<T, kDim, Producer::gather>,
                      dim3(unsigned(blocks)), dim3(kThreads), Smem<kDim>::kLaunchBytes,
                      static_cast<arch::stream_t>(stream), kp);
}

}  // namespace vdit::gpu::sm90a

// Choice of the instantiation, one head dim per file: forward_sm80_<dim>.cu.
#include "kernels/attention/forward_sm80_launch.h"

namespace vdit::gpu {

Tile forward_tile_sm80(const AttentionParams& params) { return {64, params.dim > 128 ? 32 : 64}; }

int launch_forward_sm80(const ForwardArgs& args, void* stream) {
  const int dim = args.params.dim;
  if (dim <= 64) return sm80::launch_64(args, stream);
  if (dim <= 96) return sm80::launch_96(args, stream);
  if (dim <= 128) return sm80::launch_128(args, stream);
  return sm80::launch_256(args, stream);
}

}  // namespace vdit::gpu

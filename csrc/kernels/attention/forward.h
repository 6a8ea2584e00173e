// Forward attention on a GPU: the host entry, and the seam between it and the kernels of one architecture family.
//
//   attention_forward   lists the work (schedule.h), fills the rows no tile covers, launches one of the kernels below,
//                       merges split keys (combine.h)
//   launch_forward_*    run every work item; they know nothing of lists, splits or uncovered rows but what Work says
//
// No framework and no CUDA types. `stream` is an arch::stream_t (a cudaStream_t). Nothing is read back to the host.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels/attention/params.h"

namespace vdit::gpu {

enum class Variant : int32_t { automatic = 0, sm80 = 1, sm90a = 2 };

struct ForwardOptions {
  Variant variant = Variant::automatic;
  int32_t compute_capability = 80;       // 10 * major + minor
  int32_t sm_count = 108;                // streaming multiprocessors
  int32_t max_shared_bytes = 99 * 1024;  // dynamic shared memory a block may have
  int32_t splits = 0;                    // parts the keys of an item are cut into; 0: chosen from the shapes
};

// A work item is up to `rows` consecutive query rows of one tile; a CTA runs one item, or one of `splits` parts of it.
// Items are numbered 0 .. capacity * replicas - 1; replicas are the (batch, head) pairs that share one broadcast plan.
struct Work {
  const int32_t* items;   // [capacity, 2]: tile, first row in the tile. Null for a dense plan: plain arithmetic
  const int32_t* header;  // device: [0] number of items in the list, [1] 1 if the tiles cover every row. Null: dense
  int32_t capacity;       // items per replica; those beyond header[0] do not exist
  int32_t replicas;
  int32_t rows;    // query rows per item
  int32_t splits;  // 1: results go to the outputs
  // splits > 1: fp32 [item, split, row, dim] and [item, split, row]; part_lse is log2(sum 2^(score * log2 e)), -inf
  // where nothing was read, and part_out (normalised, row_scale not applied) is not written there
  float* part_out;
  float* part_lse;
  int32_t only_uncovered;  // 1: do nothing if header[1] says that every row is covered (the fill)
};

struct ForwardArgs {
  AttentionParams params;
  AttentionOutputs outputs;
  Work work;
};

// Bytes of device memory attention_forward needs for this call: from shapes only.
size_t attention_workspace_bytes(const AttentionParams& params, const ForwardOptions& options);

// Returns 0, or a CUDA error code. The workspace is 16-byte aligned and may be null if it has 0 bytes.
int attention_forward(const AttentionParams& params, const AttentionOutputs& outputs, void* workspace, size_t bytes,
                      void* stream, const ForwardOptions& options);

// The kernel `automatic` means for this call.
Variant attention_forward_variant(const AttentionParams& params, const ForwardOptions& options);

// Query rows of a work item, and keys that are read at once (the unit in which keys are split).
struct Tile {
  int32_t rows, keys;
};

// Portable: compute capability 8.0 and newer.
Tile forward_tile_sm80(const AttentionParams& params);
int launch_forward_sm80(const ForwardArgs& args, void* stream);

// Hopper only.
Tile forward_tile_sm90a(const AttentionParams& params);
int launch_forward_sm90a(const ForwardArgs& args, void* stream);

}  // namespace vdit::gpu

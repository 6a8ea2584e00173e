// What one worker of block_mean does. Plain data: the instruction sets' builds include it.
#pragma once
#include "kernels/select/block_mean.h"

namespace vdit {

// A part of a block: what one worker sums. An empty block has one part without positions.
struct BlockMeanWork {
  int64_t batch, head, first;  // position of its first token
  int32_t count;               // positions
  float* sum;                  // D values
  int32_t* counted;            // tokens that were added
  bool whole;                  // the only part of its block: the mean is wanted
};

// Sums in the order of the positions. Returns whether every order entry was in range; others are left out. Safe to call
// from many threads.
bool cpu_block_mean_part(const BlockMeanParams& p, const BlockMeanWork& work);

}  // namespace vdit

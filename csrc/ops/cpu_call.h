// What the CPU operators share: views of tensors, lengths read on the host, torch's thread pool.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cpu/attention.h"
#include "ops/common.h"

namespace vdit {

// A tensor of four dimensions; `what` names it in a message about its dtype.
View4 view_of(const Tensor& t, const std::string& what);

// The entries of a checked kv_len; throws unless they lie in 0 ... most. `op` begins the message.
std::vector<int64_t> lengths_of(const Tensor& kv_len, int64_t most, const char* op, const char* name = "kv_len");

// Runs fn(0..n-1), each index once; passes on the first exception after all workers have stopped.
void parallel_for_each(int64_t n, const std::function<void(int64_t)>& fn);

}  // namespace vdit

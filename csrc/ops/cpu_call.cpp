#include "ops/cpu_call.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>

namespace vdit {

View4 view_of(const Tensor& t, const std::string& what) {
  View4 v;
  v.data = const_cast<void*>(t.const_data_ptr());
  v.dtype = kernel_dtype(t, what);
  for (int i = 0; i < 4; ++i) {
    v.size[i] = t.size(i);
    v.stride[i] = t.stride(i);
  }
  return v;
}

std::vector<int64_t> lengths_of(const Tensor& kv_len, int64_t most, const char* op, const char* name) {
  const bool wide = kv_len.scalar_type() == ScalarType::Long;
  std::vector<int64_t> lengths;
  for (int64_t b = 0; b < kv_len.size(0); ++b) {
    const int64_t n = wide ? kv_len.const_data_ptr<int64_t>()[b] : kv_len.const_data_ptr<int32_t>()[b];
    VDIT_CHECK(n >= 0 && n <= most, op, ": ", name, "[", b, "] is ", n, "; expected 0 to ", most);
    lengths.push_back(n);
  }
  return lengths;
}

// Indices are drawn one at a time, so that long and short items balance themselves.
void parallel_for_each(int64_t n, const std::function<void(int64_t)>& fn) {
  if (n <= 0) return;
  std::atomic<int64_t> next{0};
  const int64_t workers = std::min<int64_t>(n, torch::stable::get_num_threads());
  std::exception_ptr error;  // out of memory in a work item: reported after all workers have stopped
  std::mutex guard;
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t i = next++; i < n; i = next++) fn(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(guard);
      error = std::current_exception();
      next = n;
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace vdit

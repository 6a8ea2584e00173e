#include "cpu/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

namespace vdit {

void prefer_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t before = (page - reinterpret_cast<uintptr_t>(data) % page) % page;  // up to the first whole page
  if (bytes < before + page) return;
  madvise(static_cast<char*>(data) + before, (bytes - before) / page * page, MADV_HUGEPAGE);
#endif
}

}  // namespace vdit

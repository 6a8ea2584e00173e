// How the operating system backs large results.
#pragma once
#include <cstddef>

namespace vdit {

// Asks for large pages behind memory that is about to be written for the first time: malloc maps large tensors afresh,
// and a page fault per 4 KiB costs more than an elementwise pass. A hint; does nothing where there are none.
void prefer_large_pages(void* data, size_t bytes);

}  // namespace vdit

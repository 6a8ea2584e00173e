#include "emulator/guarded.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "emulator/emu.h"

namespace emu {

namespace {

constexpr size_t kPage = 4096;
constexpr unsigned char kCanary = 0xff;

struct Region {
  const unsigned char *mapping, *mapping_end, *data, *data_end;
  const char* name;
};
std::vector<Region>& regions() {
  static std::vector<Region> list;
  return list;
}

}  // namespace

Guarded::Guarded(const char* name, size_t bytes, size_t align, const void* like) : name_(name), bytes_(bytes) {
  const size_t odd = align < 16 ? reinterpret_cast<uintptr_t>(like) % 16 : 0;
  if (odd != 0) align = 16;
  const size_t body = (bytes + align - 1 + kPage - 1) / kPage * kPage;
  mapped_ = body + 2 * kPage;
  void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error(std::string("emulator: no memory for ") + name);
  mapping_ = static_cast<unsigned char*>(p);
  mprotect(mapping_, kPage, PROT_NONE);
  unsigned char* const end = mapping_ + kPage + body;
  mprotect(end, kPage, PROT_NONE);
  const size_t rest = (bytes + odd) % align,
               slack = rest ? align - rest : 0;  // the end is aligned, so the start must be
  data_ = end - bytes - slack;
  memset(mapping_ + kPage, kCanary, body);
  regions().push_back({mapping_, mapping_ + mapped_, data_, data_ + bytes, name});
}

Guarded::Guarded(Guarded&& other) noexcept
    : name_(other.name_), mapping_(other.mapping_), mapped_(other.mapped_), data_(other.data_), bytes_(other.bytes_) {
  other.mapping_ = nullptr;
}

Guarded::~Guarded() {
  if (mapping_ == nullptr) return;
  auto& list = regions();
  list.erase(std::remove_if(list.begin(), list.end(), [&](const Region& r) { return r.mapping == mapping_; }),
             list.end());
  munmap(mapping_, mapped_);
}

void Guarded::fill(const void* source) {
  if (bytes_) memcpy(data_, source, bytes_);
}

void Guarded::make_read_only() { mprotect(mapping_ + kPage, mapped_ - 2 * kPage, PROT_READ); }

void Guarded::check_canary() const {
  const unsigned char* const begin = mapping_ + kPage;
  const unsigned char* const end = mapping_ + mapped_ - kPage;
  for (const unsigned char* p = begin; p != end; ++p) {
    if (p == data_) p += bytes_;
    if (p == end) break;
    if (*p != kCanary) throw Error("global memory: written " + describe_address(p));
  }
}

std::string describe_address(const void* address) {
  const auto* p = static_cast<const unsigned char*>(address);
  char text[200];
  for (const Region& r : regions()) {
    if (p < r.mapping || p >= r.mapping_end) continue;
    if (p < r.data)
      snprintf(text, sizeof text, "%zd bytes before the start of %s", r.data - p, r.name);
    else if (p >= r.data_end)
      snprintf(text, sizeof text, "%zd bytes past the end of %s", p - r.data_end, r.name);
    else
      snprintf(text, sizeof text, "byte %zd of %s, which is read-only", p - r.data, r.name);
    return text;
  }
  snprintf(text, sizeof text, "%p, which belongs to no tensor", address);
  return text;
}

}  // namespace emu

// Selection in linear time: the keys of a row are counted into about as many bins as there are keys, over the range
// they span; the keys of the bin that holds the last entry that stays are counted again, over its range, and so on.
#include "kernels/select/select.h"

namespace VDIT_NS {
namespace {

constexpr int kMaxBinBits = 11;
constexpr int64_t kFewKeys = 24;  // are sorted

// Ascending with the value; NaN is the largest, -0 is 0.
inline uint32_t sort_key(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t flipped = bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? ~0u : bits == 0x80000000u ? bits : flipped;
}

inline uint64_t mass_units(uint32_t key) {
  if (key == ~0u || key < 0x80000000u) return 0;
  key ^= 0x80000000u;
  float x;
  __builtin_memcpy(&x, &key, 4);
  return x < 256.f ? uint64_t(int64_t(x * 4294967296.f)) : uint64_t(1) << 40;
}

struct Threshold {
  uint32_t key;  // of the last entry that stays
  int64_t ties;  // how many entries with this key stay
};

// One level: what is above the keys at hand, and the bins they are counted into.
template <bool kMass>
struct Selector {
  const uint64_t wanted;
  const double p;
  uint64_t limit = 0;
  bool limit_known = false;
  uint64_t above = 0, mass_above = 0;
  uint32_t count[1 << kMaxBinBits];
  uint64_t mass[kMass ? 1 << kMaxBinBits : 1];

  Selector(uint64_t wanted_, double p_) : wanted(wanted_), p(p_) {}

  bool stays(uint64_t before, uint64_t mass_before) const { return before < wanted || (kMass && mass_before <= limit); }
  void set_limit(uint64_t total) {
    limit = uint64_t(int64_t(double(int64_t(total)) * p));
    limit_known = true;
  }

  // Keys in descending order; returns the last that stays.
  Threshold walk(const uint32_t* keys, int64_t n) {
    int64_t ties = 0;
    uint32_t last = ~0u;
    for (int64_t i = 0; i < n && stays(above, mass_above); ++i) {
      ties = keys[i] == last ? ties + 1 : 1;
      last = keys[i];
      ++above;
      if (kMass) mass_above += mass_units(last);
    }
    return {last, ties};
  }

  // The keys lie in [low, high]; they are moved about.
  Threshold find(uint32_t* keys, int64_t n, uint32_t low, uint32_t high) {
    for (;;) {
      if (low == high) {  // equal keys
        if (kMass && !limit_known) set_limit(uint64_t(n) * mass_units(low));
        int64_t ties = wanted > above ? int64_t(wanted - above) : 0;
        if (kMass && mass_above <= limit) {
          const uint64_t units = mass_units(low);
          const uint64_t some = units == 0 ? uint64_t(n) : (limit - mass_above) / units + 1;
          if (some > uint64_t(ties)) ties = some < uint64_t(n) ? int64_t(some) : n;
        }
        return {low, ties < n ? ties : n};
      }
      if (n <= kFewKeys) {
        for (int64_t i = 1; i < n; ++i) {
          const uint32_t key = keys[i];
          int64_t j = i;
          for (; j > 0 && keys[j - 1] < key; --j) keys[j] = keys[j - 1];
          keys[j] = key;
        }
        if (kMass && !limit_known) {
          uint64_t total = 0;
          for (int64_t i = 0; i < n; ++i) total += mass_units(keys[i]);
          set_limit(total);
        }
        return walk(keys, n);
      }
      int bits = 4;
      while (bits < kMaxBinBits && int64_t(1) << bits < n) ++bits;
      const int width = 32 - __builtin_clz(high - low), shift = width > bits ? width - bits : 0;
      const auto bins = int((high - low) >> shift) + 1;
      for (int b = 0; b < bins; ++b) count[b] = 0;
      if (kMass)
        for (int b = 0; b < bins; ++b) mass[b] = 0;
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t b = (keys[i] - low) >> shift;
        ++count[b];
        if (kMass) mass[b] += mass_units(keys[i]);
      }
      if (kMass && !limit_known) {
        uint64_t total = 0;
        for (int b = 0; b < bins; ++b) total += mass[b];
        set_limit(total);
      }
      int bin = bins - 1, last = bin;  // the last bin with an entry that stays
      uint64_t before = above, mass_before = mass_above;
      for (; bin >= 0 && stays(before, mass_before); --bin) {
        if (count[bin] == 0) continue;
        above = before;
        mass_above = mass_before;
        last = bin;
        before += count[bin];
        if (kMass) mass_before += mass[bin];
      }
      int64_t kept = 0;
      uint32_t least = ~0u, most = 0;
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t key = keys[i];
        keys[kept] = key;
        const bool in = (key - low) >> shift == uint32_t(last);
        kept += in;
        if (in && key < least) least = key;
        if (in && key > most) most = key;
      }
      if (above + uint64_t(kept) == wanted) return {least, kept};  // all of the bin stay
      n = kept;
      low = least;
      high = most;
    }
  }
};

template <bool kMass>
void rows(const vdit::SelectParams& p, int64_t first, int64_t last, uint32_t* keys, uint32_t* scratch) {
  for (int64_t row = first; row < last; ++row) {
    const float* x = p.scores + row * p.n;
    uint8_t* keep = p.keep + row * p.n;
    int64_t k = p.at_least;
    if (p.k_rows != nullptr)
      k = p.k_bytes == 8 ? static_cast<const int64_t*>(p.k_rows)[row] : static_cast<const int32_t*>(p.k_rows)[row];
    k = k < 1 ? 1 : k < p.n ? k : p.n;
    if (!kMass && k == p.n) {
      __builtin_memset(keep, 1, p.n);
      continue;
    }
    uint32_t low = ~0u, high = 0;
    for (int64_t i = 0; i < p.n; ++i) {
      const uint32_t key = sort_key(x[i]);
      keys[i] = scratch[i] = key;
      low = key < low ? key : low;
      high = key > high ? key : high;
    }
    Selector<kMass> selector(uint64_t(k), p.p);
    const Threshold t = selector.find(scratch, p.n, low, high);
    int64_t equal = 0;
    for (int64_t i = 0; i < p.n; ++i) {
      keep[i] = keys[i] >= t.key;
      equal += keys[i] == t.key;
    }
    for (int64_t i = p.n - 1; equal > t.ties; --i) {  // the last of the equal ones go
      if (keys[i] != t.key) continue;
      keep[i] = 0;
      --equal;
    }
  }
}

}  // namespace

void select_rows(const vdit::SelectParams& p, int64_t first, int64_t last, uint32_t* buffer) {
  if (p.by_mass)
    rows<true>(p, first, last, buffer, buffer + p.n);
  else
    rows<false>(p, first, last, buffer, buffer + p.n);
}

}  // namespace VDIT_NS

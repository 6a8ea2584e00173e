// Radix select, one CTA per row: the key of the last entry that stays is found digit by digit, 11, 11 and 10 bits from
// the top. A pass counts the entries of every value of the digit (and adds up their mass) in shared memory, among the
// entries whose higher digits are those found so far. Ties of the last key are resolved by a scan in index order, which
// most rows do not need.
//
// kStaged: the keys stay in shared memory (each thread reads back its own); otherwise every pass reads the row again.
#pragma once
#include "arch/arch.h"
#include "kernels/block_sum.h"
#include "kernels/select/select.h"

namespace vdit::gpu::selection {

constexpr int kBins = 2048, kDigitBits = 11;
constexpr int kLoads = 8;  // loads in flight per thread

// Ascending with the value; NaN is the largest, -0 is 0.
VD_DEV uint32_t sort_key(float x) {
  const uint32_t bits = arch::as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return ~0u;
  if (bits == 0x80000000u) return bits;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

VD_DEV uint64_t mass_units(uint32_t key) {
  if (key == ~0u || key < 0x80000000u) return 0;
  const float x = arch::as_float(key ^ 0x80000000u);
  return x < 256.f ? uint64_t(x * 4294967296.f) : uint64_t(1) << 40;
}

VD_DEV int64_t entries_to_keep(const SelectParams& p, int64_t row) {
  int64_t k = p.at_least;
  if (p.k_rows != nullptr)
    k = p.k_bytes == 8 ? static_cast<const int64_t*>(p.k_rows)[row] : static_cast<const int32_t*>(p.k_rows)[row];
  return k < 1 ? 1 : k < p.n ? k : p.n;
}

template <int kThreads, bool kMass, bool kStaged>
struct Row {
  static constexpr int kPerThread = kBins / kThreads;
  static constexpr int kHistogramBytes = kBins * 4 * (kMass ? 3 : 1);  // counts, masses: low words, high words

  const float* scores;
  int64_t n;
  uint32_t counts, keys;  // in shared memory

  // Bins of a thread lie kThreads words apart: no bank conflicts where each thread walks its own.
  VD_STATIC_METHOD uint32_t slot(uint32_t bin) { return (bin % kPerThread * kThreads + bin / kPerThread) * 4; }

  VD_METHOD void clear() const {
    VD_UNROLL for (int i = 0; i < kHistogramBytes / 4 / kThreads; ++i)
        arch::sts32(counts + (i * kThreads + threadIdx.x) * 4, 0);
  }
  VD_METHOD void add(uint32_t bin, uint32_t key) const {
    const uint32_t at = counts + slot(bin);
    arch::shared_add(at, 1);
    if constexpr (kMass) {
      const uint64_t units = mass_units(key);
      const uint32_t low = uint32_t(units);
      uint32_t high = uint32_t(units >> 32);
      if (low != 0) {
        const uint32_t before = arch::shared_add(at + kBins * 4, low);
        high += before + low < before;  // carry
      }
      if (high != 0) arch::shared_add(at + kBins * 8, high);
    }
  }
  VD_METHOD uint64_t mass(uint32_t bin) const {
    const uint32_t at = counts + slot(bin);
    return arch::lds32(at + kBins * 4) | uint64_t(arch::lds32(at + kBins * 8)) << 32;
  }
  // Calls body(index, key) for the entries of this thread, the same ones in every call.
  template <class Body>
  VD_METHOD void for_each(Body body) const {
    if constexpr (kStaged) {
      for (int i = threadIdx.x; i < n; i += kThreads) body(i, arch::lds32(keys + i * 4));
    } else {
      for (int64_t base = threadIdx.x; base < n; base += kThreads * kLoads) {
        float x[kLoads];
        VD_UNROLL for (int u = 0; u < kLoads; ++u) x[u] = base + u * kThreads < n ? scores[base + u * kThreads] : 0.f;
        VD_UNROLL for (int u = 0; u < kLoads; ++u) {
          if (base + u * kThreads < n) body(base + u * kThreads, sort_key(x[u]));
        }
      }
    }
  }
  VD_METHOD uint32_t key(int64_t i) const {
    if constexpr (kStaged) return arch::lds32(keys + uint32_t(i) * 4);
    return sort_key(scores[i]);
  }
};

// Entries above the keys that begin with the digits found so far, and those with just these digits.
struct Group {
  uint32_t prefix;
  uint32_t above, count;
  uint64_t mass_above;
};

template <int kThreads, bool kMass, bool kStaged>
VD_KERNEL(kThreads, 1)
select_rows(const VD_GRID_CONST SelectParams p) {
  using R = Row<kThreads, kMass, kStaged>;
  VD_DYN_SMEM(smem);
  VD_SHARED(uint64_t, count_totals, kThreads / 32);
  VD_SHARED(uint64_t, mass_totals, kThreads / 32);
  VD_SHARED(uint64_t, found, 3);
  VD_SHARED(uint32_t, ties_of_warp, 2 * (kThreads / 32));
  const int64_t index = blockIdx.x;
  const uint32_t base = arch::smem_u32(smem);
  const R row{p.scores + index * p.n, p.n, base, base + R::kHistogramBytes};
  uint8_t* const keep = p.keep + index * p.n;
  const auto wanted = uint64_t(entries_to_keep(p, index));
  if constexpr (kStaged) {
    for (int i = threadIdx.x; i < p.n; i += kThreads) arch::sts32(row.keys + i * 4, sort_key(row.scores[i]));
  }

  Group g{};
  uint64_t limit = 0;
  // Does the entry stay that has this many entries and this much mass before it?
  const auto stays = [&](uint64_t count, uint64_t mass) { return count < wanted || (kMass && mass <= limit); };
  bool whole = false;  // every entry of the group stays
  for (int pass = 0; pass < 3 && !whole; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    const uint32_t digits = pass == 2 ? 1024 : kBins;
    const uint32_t fixed = pass == 0 ? 0 : ~0u << (pass == 1 ? 21 : 10);
    row.clear();
    arch::syncthreads();
    row.for_each([&](int64_t, uint32_t key) {
      if ((key & fixed) == g.prefix) row.add(key >> shift & (digits - 1), key);
    });
    arch::syncthreads();

    // Thread 0 has the highest bins.
    const uint32_t first = (kThreads - 1 - threadIdx.x) * R::kPerThread;
    uint64_t count = 0, mass = 0;
    VD_UNROLL for (int j = 0; j < R::kPerThread; ++j) {
      count += arch::lds32(row.counts + R::slot(first + j));
      if constexpr (kMass) mass += row.mass(first + j);
    }
    const uint64_t own_count = count, own_mass = mass;
    count = g.above + block_inclusive_sum(count, count_totals) - own_count;
    if constexpr (kMass) {
      mass = g.mass_above + block_inclusive_sum(mass, mass_totals) - own_mass;
      if (pass == 0) {
        uint64_t total = 0;
        for (int i = 0; i < kThreads / 32; ++i) total += mass_totals[i];
        limit = uint64_t(int64_t(double(int64_t(total)) * p.p));
        whole = stays(uint64_t(p.n), total);
      }
    } else if (pass == 0) {
      whole = wanted == uint64_t(p.n);
    }
    if (whole) break;  // prefix 0: every key is at least that

    // Exactly one bin holds the last entry that stays: its first entry stays, the one after the bin does not.
    VD_UNROLL for (int j = R::kPerThread - 1; j >= 0; --j) {
      const uint32_t bin = first + j, in_bin = arch::lds32(row.counts + R::slot(bin));
      const uint64_t bin_mass = kMass ? row.mass(bin) : 0;
      if (in_bin != 0 && stays(count, mass) && !stays(count + in_bin, mass + bin_mass)) {
        found[0] = uint64_t(bin) << 32 | count;
        found[1] = in_bin;
        found[2] = mass;
      }
      count += in_bin;
      mass += bin_mass;
    }
    arch::syncthreads();
    g.prefix |= uint32_t(found[0] >> 32) << shift;
    g.above = uint32_t(found[0]);
    g.count = uint32_t(found[1]);
    g.mass_above = found[2];
    whole = g.count == 1 || g.above + uint64_t(g.count) == wanted;
  }

  uint32_t ties = g.count;  // entries of the group that stay, all with the key g.prefix
  if (!whole) {
    uint64_t some = wanted > g.above ? wanted - g.above : 0;
    if (kMass && g.mass_above <= limit) {
      // The mass after the group is above the limit, so its entries have some.
      const uint64_t by_mass = (limit - g.mass_above) / mass_units(g.prefix) + 1;
      if (by_mass > some) some = by_mass;
    }
    whole = some >= g.count;
    ties = uint32_t(some);
  }
  if (whole) {
    row.for_each([&](int64_t i, uint32_t key) { keep[i] = key >= g.prefix; });
    return;
  }

  // The first `ties` entries with that key, by index.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t before = 0;
  int buffer = 0;
  for (int64_t chunk = 0; chunk < p.n; chunk += kThreads, buffer ^= kThreads / 32) {
    const int64_t i = chunk + threadIdx.x;
    const uint32_t key = i < p.n ? row.key(i) : 0;
    const bool tie = i < p.n && key == g.prefix;
    const uint32_t votes = arch::vote_ballot(tie);
    if (lane == 0) ties_of_warp[buffer + warp] = uint32_t(arch::popc(votes));
    arch::syncthreads();  // two buffers: one barrier per chunk
    uint32_t rank = before + uint32_t(arch::popc(votes & ((1u << lane) - 1)));
    for (int w = 0; w < kThreads / 32; ++w) {
      const uint32_t n = ties_of_warp[buffer + w];
      if (w < warp) rank += n;
      before += n;
    }
    if (i < p.n) keep[i] = key > g.prefix || (tie && rank < ties);
  }
}

}  // namespace vdit::gpu::selection

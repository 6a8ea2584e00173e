#include "cpu/compile_blocks.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace vdit {
namespace {

// Eight bytes to eight bits: whether each is not 0. torch writes booleans as 0 and 1, but views of bytes hold any
// value.
uint64_t eight_bits(const uint8_t* p) {
  uint64_t bytes;
  std::memcpy(&bytes, p, 8);
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7fu;
  bytes = (((bytes & kLow) + kLow) | bytes) >> 7 & ~kLow >> 7;
  return bytes * 0x0102040810204080u >> 56;
}

uint64_t load_bits(const uint8_t* p, int64_t n) {
  uint64_t bits = 0;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) bits |= eight_bits(p + i) << i;
  for (; i < n; ++i) bits |= uint64_t(p[i] != 0) << i;
  return bits;
}

// Calls body(begin, end) with the keys of each run.
template <class Body>
void for_each_run(const uint64_t* turns, int64_t words, const std::vector<int32_t>& edge, Body body) {
  int32_t begin = 0;
  bool open = false;
  for (int64_t w = 0; w < words; ++w) {
    for (uint64_t bits = turns[w]; bits != 0; bits &= bits - 1) {
      const int32_t at = edge[size_t(w * 64 + __builtin_ctzll(bits))];
      if (open) body(begin, at);
      begin = at;
      open = !open;
    }
  }
  if (open) body(begin, edge.back());
}

}  // namespace

BlockCompiler::BlockCompiler(const BlockMap& map, ParallelFor parallel_for)
    : map_(map), parallel_for_(std::move(parallel_for)), columns_(size_t(map.kv_groups)), words_((map.nk + 63) / 64) {
  const int64_t rows = map_.groups * map_.nq;
  for (int32_t g = 0; g < map_.kv_groups; ++g) {
    Columns& c = columns_[size_t(g)];
    int64_t at = 0;
    for (int64_t j = 0; j < map_.nk; ++j) {
      const int64_t keys = map_.kv_len[g * map_.nk + j];
      if (keys == 0) continue;
      c.block.push_back(int32_t(j));
      c.edge.push_back(int32_t(at));
      at += keys;
    }
    c.edge.push_back(int32_t(at));
    if (int64_t(c.block.size()) == map_.nk) c.block.clear();
  }
  turns_.resize(size_t(rows * words_));
  reads_.resize(size_t(rows));
  counts_.resize(size_t(rows));
  parallel_for_(rows, [this](int64_t first, int64_t last) {
    std::vector<uint8_t> gathered(static_cast<size_t>(map_.nk));
    for (int64_t row = first; row < last; ++row) pack(row, gathered.data());
  });

  for (int64_t g = 0; g < map_.groups; ++g) {
    const int64_t* q_len = map_.q_len + (map_.q_groups == 1 ? 0 : g * map_.nq);
    int64_t at = 0;
    for (int64_t i = 0; i < map_.nq; ++i) {
      const int64_t row = g * map_.nq + i, step = map_.q_tile == 0 ? q_len[i] : map_.q_tile;
      for (int64_t done = 0; done < q_len[i]; done += step) {
        const int64_t taken = std::min(step, q_len[i] - done);
        tiles_.push_back({reads_[size_t(row)] * taken, int32_t(row), int32_t(at + done), int32_t(taken)});
        runs_ += counts_[size_t(row)];
      }
      at += q_len[i];
    }
  }
  std::stable_sort(tiles_.begin(), tiles_.end(), [](const Tile& a, const Tile& b) { return a.work > b.work; });
}

void BlockCompiler::pack(int64_t row, uint8_t* gathered) {
  const Columns& c = columns(row);
  const auto n = int64_t(c.edge.size()) - 1;
  const uint8_t* keep = map_.keep + row * map_.nk;
  if (n < map_.nk) {
    for (int64_t j = 0; j < n; ++j) gathered[j] = keep[c.block[size_t(j)]];
    keep = gathered;
  }
  uint64_t* turns = turns_.data() + row * words_;
  uint64_t before = 0;
  for (int64_t w = 0; w < words_; ++w) {
    const int64_t here = std::clamp<int64_t>(n - w * 64, 0, 64);
    const uint64_t bits = load_bits(keep + w * 64, here);
    turns[w] = bits ^ (bits << 1 | before);
    if (here < 64) turns[w] &= (uint64_t(1) << here) - 1;  // a run that is open at the end is closed there
    before = bits >> 63;
  }
  int64_t reads = 0;
  int32_t runs = 0;
  for_each_run(turns, words_, c.edge, [&](int32_t begin, int32_t end) {
    reads += end - begin;
    ++runs;
  });
  reads_[size_t(row)] = reads;
  counts_[size_t(row)] = runs;
}

void BlockCompiler::write(const PlanLists& out) const {
  out.run_ptr[0] = 0;
  for (size_t t = 0; t < tiles_.size(); ++t) {
    const Tile& tile = tiles_[t];
    out.tiles[3 * t] = int32_t(tile.row / map_.nq);
    out.tiles[3 * t + 1] = tile.first;
    out.tiles[3 * t + 2] = tile.rows;
    out.run_ptr[t + 1] = out.run_ptr[t] + counts_[size_t(tile.row)];
  }
  parallel_for_(tiles(), [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      const int64_t row = tiles_[size_t(t)].row;
      int32_t* run = out.runs + 3 * int64_t(out.run_ptr[t]);
      for_each_run(turns_.data() + row * words_, words_, columns(row).edge, [&](int32_t begin, int32_t end) {
        run[0] = begin;
        run[1] = end - begin;
        run[2] = -1;
        run += 3;
      });
    }
  });
}

}  // namespace vdit

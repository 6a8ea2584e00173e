#include "cpu/attention_plan.h"

#include <algorithm>
#include <sstream>

namespace vdit {

namespace {

template <class... T>
std::string text(const T&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  return s.str();
}

std::string check_order(const char* name, const OrderView& order, int64_t batch, int64_t heads, int64_t n) {
  if (order.data == nullptr) return {};
  if (order.n != n || (order.batch != 1 && order.batch != batch) || (order.heads != 1 && order.heads != heads))
    return text("plan.", name, " has shape [", order.batch, ", ", order.heads, ", ", order.n, "], expected [1 or ",
                batch, ", 1 or ", heads, ", ", n, "]");
  std::vector<bool> seen(static_cast<size_t>(n));
  for (int64_t row = 0; row < order.batch * order.heads; ++row) {
    std::fill(seen.begin(), seen.end(), false);
    const int32_t* p = order.data + row * n;
    for (int64_t i = 0; i < n; ++i) {
      if (p[i] < 0 || p[i] >= n || seen[static_cast<size_t>(p[i])])
        return text("plan.", name, " row ", row, " is not a permutation of 0..", n - 1, " (position ", i, " holds ",
                    p[i], ")");
      seen[static_cast<size_t>(p[i])] = true;
    }
  }
  return {};
}

}  // namespace

std::string check_plan(const PlanView& plan, int64_t batch, int64_t heads, int64_t lq, int64_t lk, int64_t num_runs,
                       int64_t mask_words) {
  if ((plan.batch != 1 && plan.batch != batch) || (plan.heads != 1 && plan.heads != heads))
    return text("plan was made for batch ", plan.batch, " and ", plan.heads, " heads, but the tensors have batch ",
                batch, " and ", heads, " heads (1 broadcasts)");
  if (plan.run_ptr[0] != 0) return text("plan.run_ptr[0] is ", plan.run_ptr[0], ", expected 0");
  // A row that two tiles own would be written twice.
  std::vector<std::vector<bool>> owned(static_cast<size_t>(plan.batch * plan.heads));
  for (int64_t t = 0; t < plan.num_tiles; ++t) {
    const int64_t bh = plan.tiles[3 * t], start = plan.tiles[3 * t + 1], len = plan.tiles[3 * t + 2];
    if (bh < 0 || bh >= plan.batch * plan.heads || start < 0 || len < 0 || start + len > lq)
      return text("plan.tiles[", t, "] = (", bh, ", ", start, ", ", len, ") lies outside ", plan.batch * plan.heads,
                  " heads of ", lq, " queries; was the plan made for another shape?");
    auto& rows = owned[static_cast<size_t>(bh)];
    if (rows.empty()) rows.resize(static_cast<size_t>(lq));
    for (int64_t i = start; i < start + len; ++i) {
      if (rows[static_cast<size_t>(i)]) return text("plan.tiles[", t, "] claims query ", i, ", which another tile has");
      rows[static_cast<size_t>(i)] = true;
    }
    const int64_t begin = plan.run_ptr[t], end = plan.run_ptr[t + 1];
    if (end < begin || end > num_runs)
      return text("plan.run_ptr[", t + 1, "] = ", end, " is not in ", begin, "..", num_runs);
    int64_t previous = 0;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t kv = plan.runs[3 * r], n = plan.runs[3 * r + 1], mask = plan.runs[3 * r + 2];
      if (kv < previous || n < 0 || kv + n > lk)
        return text("plan.runs[", r, "] = (", kv, ", ", n, ") overlaps the run before it or lies outside ", lk,
                    " keys; was the plan made for another shape?");
      previous = kv + n;
      if (mask < -1 || (mask >= 0 && mask + len * ((n + 31) / 32) > mask_words))
        return text("plan.runs[", r, "] needs mask words ", mask, "..", mask + len * ((n + 31) / 32),
                    ", mask_bits has ", mask_words);
    }
  }
  std::string error = check_order("q_order", plan.q_order, batch, heads, lq);
  return error.empty() ? check_order("kv_order", plan.kv_order, batch, heads, lk) : error;
}

DensePlan::DensePlan(int64_t lq, int64_t lk) : run_ptr{0} {
  for (int64_t q = 0; q < lq; q += kTileRows) {
    tiles.insert(tiles.end(), {0, static_cast<int32_t>(q), static_cast<int32_t>(std::min<int64_t>(kTileRows, lq - q))});
    runs.insert(runs.end(), {0, static_cast<int32_t>(lk), -1});
    run_ptr.push_back(static_cast<int32_t>(run_ptr.size()));
  }
}

PlanView DensePlan::view() const {
  PlanView v;
  v.num_tiles = static_cast<int64_t>(run_ptr.size()) - 1;
  v.tiles = tiles.data();
  v.run_ptr = run_ptr.data();
  v.runs = runs.data();
  return v;
}

CoveredPlan::CoveredPlan(const PlanView& plan, int64_t lq)
    : tiles(plan.tiles, plan.tiles + 3 * plan.num_tiles), run_ptr(plan.run_ptr, plan.run_ptr + plan.num_tiles + 1) {
  std::vector<std::vector<bool>> owned(static_cast<size_t>(plan.batch * plan.heads),
                                       std::vector<bool>(static_cast<size_t>(lq)));
  for (int64_t t = 0; t < plan.num_tiles; ++t) {
    const auto first = owned[static_cast<size_t>(plan.tiles[3 * t])].begin() + plan.tiles[3 * t + 1];
    std::fill(first, first + plan.tiles[3 * t + 2], true);
  }
  for (size_t bh = 0; bh < owned.size(); ++bh) {
    for (int64_t row = 0; row < lq;) {
      const auto from = owned[bh].begin() + row;
      const int64_t next = std::find(from, owned[bh].end(), !*from) - owned[bh].begin();
      if (!*from) {
        tiles.insert(tiles.end(),
                     {static_cast<int32_t>(bh), static_cast<int32_t>(row), static_cast<int32_t>(next - row)});
        run_ptr.push_back(run_ptr.back());
      }
      row = next;
    }
  }
}

TileIndex::TileIndex(const PlanView& plan, int panel_keys)
    : plan_(plan),
      first_(static_cast<size_t>(plan.batch * plan.heads + 1)),
      tiles_(static_cast<size_t>(plan.num_tiles)),
      keys_(static_cast<size_t>(plan.num_tiles)),
      panels_(static_cast<size_t>(plan.num_tiles)) {
  for (int64_t t = 0; t < plan.num_tiles; ++t) ++first_[static_cast<size_t>(plan.tiles[3 * t]) + 1];
  for (size_t i = 1; i < first_.size(); ++i) first_[i] += first_[i - 1];
  std::vector<int64_t> next(first_.begin(), first_.end() - 1);
  for (int64_t t = 0; t < plan.num_tiles; ++t) {
    tiles_[static_cast<size_t>(next[static_cast<size_t>(plan.tiles[3 * t])]++)] = static_cast<int32_t>(t);
    for (int64_t r = plan.run_ptr[t]; r < plan.run_ptr[t + 1]; ++r) {
      const int64_t start = plan.runs[3 * r], keys = plan.runs[3 * r + 1];
      keys_[static_cast<size_t>(t)] += keys;
      if (keys > 0) panels_[static_cast<size_t>(t)] += (start + keys - 1) / panel_keys - start / panel_keys + 1;
    }
  }
}

Reads TileIndex::reads(int64_t b, int64_t h) const {
  Reads sum;
  const size_t bh = head(b, h);
  for (int64_t i = first_[bh]; i < first_[bh + 1]; ++i) {
    const int32_t tile = tiles_[static_cast<size_t>(i)];
    const int64_t parts = (plan_.tiles[3 * tile + 2] + kTileRows - 1) / kTileRows;
    sum.items += parts;
    sum.panels += parts * panels_[static_cast<size_t>(tile)];
  }
  return sum;
}

void TileIndex::append_items(int64_t b, int64_t h, int32_t source, std::vector<WorkItem>* items) const {
  const size_t bh = head(b, h);
  for (int64_t i = first_[bh]; i < first_[bh + 1]; ++i) {
    const int32_t tile = tiles_[static_cast<size_t>(i)];
    const int64_t keys = keys_[static_cast<size_t>(tile)];
    const int32_t start = plan_.tiles[3 * tile + 1], len = plan_.tiles[3 * tile + 2];
    if (len == 0) continue;
    const int32_t parts = (len + kTileRows - 1) / kTileRows;
    // An even cut, rounded up to 12 so that only the last part has rows beyond the micro-kernel's height.
    const int32_t step = std::min<int32_t>(kTileRows, ((len + parts - 1) / parts + 11) / 12 * 12);
    for (int32_t row = 0; row < len; row += step) {
      const int32_t rows = std::min(step, len - row);
      items->push_back(
          {static_cast<int32_t>(b), static_cast<int32_t>(h), tile, start + row, rows, row, source, rows * (keys + 1)});
    }
  }
}

void list_panels(const PlanView& plan, int32_t tile, int panel_keys, const uint32_t* valid_panels,
                 std::vector<PanelRef>* refs) {
  refs->clear();
  for (int64_t r = plan.run_ptr[tile]; r < plan.run_ptr[tile + 1]; ++r) {
    const int32_t start = plan.runs[3 * r], end = start + plan.runs[3 * r + 1], mask = plan.runs[3 * r + 2];
    for (int32_t panel = start / panel_keys; panel * panel_keys < end; ++panel) {
      const int32_t key = panel * panel_keys;
      uint32_t valid = valid_panels[panel];
      if (key < start) valid &= ~0u << (start - key);
      if (end - key < panel_keys) valid &= ~(~0u << (end - key));
      if (valid != 0) refs->push_back({panel, valid, mask, key - start, (end - start + 31) / 32});
    }
  }
}

void list_all_panels(int64_t panels, const uint32_t* valid_panels, std::vector<PanelRef>* refs) {
  refs->clear();
  for (int64_t panel = 0; panel < panels; ++panel)
    if (valid_panels[panel] != 0) refs->push_back({static_cast<int32_t>(panel), valid_panels[panel], -1, 0, 0});
}

}  // namespace vdit

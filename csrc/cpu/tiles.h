// How attention over a ragged batch is cut into tasks. The cut depends on a row's own lengths alone, never on the
// number of threads or on the other rows, and so does the order of every sum.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace diffmas {

struct QueryPlan {
  std::vector<QueryTile> tiles;
  std::vector<SplitTile> splits;
  int64_t partial_rows = 0;
  int64_t work = 0;  // query rows * columns
};

/// Rows with at most this many query rows per kv head are split over their columns too, so that a few long rows keep
/// every thread busy.
constexpr int64_t SPLIT_ROWS = 2 * TILE, SPLIT_COLUMNS = 1024;

inline QueryPlan plan_queries(const RowRanges& rows, const Mask& mask, int64_t batch, int64_t heads, int64_t group) {
  QueryPlan plan;
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t total = rows.count(row) * group;
    for (int64_t first = 0; first < total; first += TILE) {
      const int64_t last = std::min(first + TILE, total);
      const int64_t lowest = mask.first_seen(rows.position(row, first / group)) / STEP * STEP;
      const int64_t columns = mask.end_seen(rows.position(row, (last - 1) / group)) - lowest;
      const int64_t longest = total <= NARROW ? NARROW_COLUMNS : total <= SPLIT_ROWS ? SPLIT_COLUMNS : columns;
      const int64_t count = (columns + longest - 1) / longest;
      const int64_t width = ((columns + count - 1) / count + STEP - 1) / STEP * STEP;
      for (int64_t head = 0; head < heads; ++head) {
        if (count > 1) plan.splits.push_back({row, head, first, last, plan.partial_rows, count});
        for (int64_t split = 0; split < count; ++split) {
          const int64_t begin = std::min(split * width, columns), end = std::min(begin + width, columns);
          plan.tiles.push_back(
              {row, head, first, last, lowest + begin, lowest + end, count > 1 ? plan.partial_rows : -1});
          plan.partial_rows += count > 1 ? last - first : 0;
          plan.work += (last - first) * (end - begin);
        }
      }
    }
  }
  const auto cost = [](const QueryTile& tile) {
    return (tile.last - tile.first) * (tile.column_end - tile.column_begin);
  };
  std::stable_sort(
      plan.tiles.begin(), plan.tiles.end(), [&](const QueryTile& a, const QueryTile& b) { return cost(a) > cost(b); });
  return plan;
}

struct ColumnPlan {
  std::vector<ColumnTile> tiles;
  int64_t work = 0;  // columns * query rows
};

inline ColumnPlan plan_columns(
    const RowRanges& rows, const Mask& mask, const int32_t* column_begin, const int32_t* column_end, int64_t batch,
    int64_t heads, int64_t group) {
  ColumnPlan plan;
  std::vector<std::pair<int64_t, ColumnTile>> tiles;
  for (int64_t row = 0; row < batch; ++row)
    for (int64_t begin = column_begin[row]; rows.count(row) > 0 && begin < column_end[row]; begin += TILE) {
      const int64_t end = std::min<int64_t>(begin + TILE, column_end[row]);
      const int64_t start = rows.position(row, 0), tokens = rows.count(row);
      const int64_t seeing =
          std::min(tokens, mask.end_seeing(end - 1) - start) - std::max<int64_t>(0, mask.first_seeing(begin) - start);
      const int64_t work = std::max<int64_t>(0, seeing) * group * (end - begin);
      for (int64_t head = 0; work > 0 && head < heads; ++head) {
        tiles.push_back({work, {row, head, begin, end}});
        plan.work += work;
      }
    }
  std::stable_sort(tiles.begin(), tiles.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const auto& [work, tile] : tiles) plan.tiles.push_back(tile);
  return plan;
}

/// Columns of one task where queries' gradients are summed beside those of columns, and the most of its partial sums.
constexpr int64_t GRADIENT_COLUMNS = 512, GRADIENT_SPLITS = 8, GRADIENT_ELEMENTS = 1 << 22;

struct GradientPlan {
  std::vector<GradientTile> tiles;
  std::vector<SplitTile> sums;  // of the tiles' partial sums
  int64_t partial_rows = 0;
  int64_t work = 0;  // query rows * columns
};

inline GradientPlan plan_gradients(
    const RowRanges& rows, const Mask& mask, int64_t batch, int64_t heads, int64_t group, int64_t dim) {
  GradientPlan plan;
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t tokens = rows.count(row), total = tokens * group;
    if (tokens == 0) continue;
    const int64_t lowest = mask.first_seen(rows.position(row, 0)) / TILE * TILE;
    const int64_t columns = mask.end_seen(rows.position(row, tokens - 1)) - lowest;
    const int64_t most = std::min(GRADIENT_SPLITS, GRADIENT_ELEMENTS / (total * dim));
    const int64_t wanted = std::clamp<int64_t>(columns / GRADIENT_COLUMNS, 1, std::max<int64_t>(1, most));
    const int64_t width = ((columns + wanted - 1) / wanted + TILE - 1) / TILE * TILE;
    const int64_t splits = (columns + width - 1) / width;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t first = 0; first < total; first += TILE)
        plan.sums.push_back({row, head, first, std::min(first + TILE, total), plan.partial_rows, splits});
      for (int64_t begin = 0; begin < columns; begin += width) {
        plan.tiles.push_back({row, head, lowest + begin, lowest + std::min(begin + width, columns), plan.partial_rows});
        plan.partial_rows += total;
      }
    }
    plan.work += total * columns * heads;
  }
  return plan;
}

}  // namespace diffmas

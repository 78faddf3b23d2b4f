// Gradients of keys and values, and of queries with them (arXiv 2307.08691, algorithm 2): a tile of columns against all
// the queries that see it. Here the panels hold columns, and queries are read one broadcast element at a time.
#include "cpu/kernels/attention.h"

namespace diffmas {
namespace DIFFMAS_ISA {

namespace {

/// The columns that get their gradient.
struct Owed {
  int64_t begin, end;
};

template <class T>
struct QueryStep {
  int64_t count;
  T *q, *grad_out;  // [count, padded(dim)]
  T* grad_q;        // the same, added to, or null
  T lse[STEP], delta[STEP];
  int64_t positions[STEP];
};

template <int NV, class S>
struct Panel {
  using T = Acc<S>;
  T *key, *value, *grad_key, *grad_value;  // [dim, NV * W]
  Tile<T> key_rows;                        // of the columns, readable in whole vectors; for the queries' gradients
  LanePositions<NV, T> columns;
  Mask mask;
  T softcap;

  void begin(const ColumnGradient<S>& p, const ColumnTile& tile, int64_t first, T* row, T* spare) {
    constexpr int64_t width = NV * W<T>;
    fill(grad_key, p.dim * width, T(0));
    fill(grad_value, p.dim * width, T(0));
    mask = p.mask;
    softcap = p.softcap;
    columns.lowest = first;
    columns.highest = smaller(first + width, tile.end) - 1;
    for (int64_t lane = 0; lane < width; ++lane) {
      // Lanes beyond the tile repeat its last column, and their result is not written.
      const int64_t column = smaller(first + lane, columns.highest);
      columns.set(lane, column);
      read_row(row, p.keys.at(tile.row, tile.head, column), p.dim, p.scale);
      scatter_lane<NV>(key, lane, row, p.dim);
      read_row(row, p.values.at(tile.row, tile.head, column), p.dim);
      scatter_lane<NV>(value, lane, row, p.dim);
    }
    if (spare == nullptr) return;
    const int64_t count = columns.highest + 1 - first, column_stride = p.keys.column_stride;
    const S* keys = p.keys.at(tile.row, tile.head, first);
    key_rows = p.dim % W<T> == 0 ? as_tile(keys, column_stride, count, p.dim, spare)
                                 : converted(keys, column_stride, count, p.dim, spare);
  }

  void step(const QueryStep<T>& queries, int64_t dim, bool owed, T* scores, T* grads) {
    constexpr int64_t width = NV * W<T>;
    const int64_t first_seeing = mask.first_seeing(columns.lowest), end_seeing = mask.end_seeing(columns.highest);
    int64_t hidden = 0;  // leading query rows that see no column of this panel
    while (hidden < queries.count && queries.positions[hidden] < first_seeing) ++hidden;
    int64_t end = queries.count;  // those behind see none any more
    while (end > hidden && queries.positions[end - 1] >= end_seeing) --end;
    const int64_t count = end - hidden, stride = padded<T>(dim);
    if (count == 0) return;
    const T *q = queries.q + hidden * stride, *grad_out = queries.grad_out + hidden * stride;
    panel<Into::Overwrite, Left::RowMajor, NV>(count, scores, width, q, stride, key, width, dim);
    panel<Into::Overwrite, Left::RowMajor, NV>(count, grads, width, grad_out, stride, value, width, dim);
    const int64_t first_seeing_all = mask.first_seeing(columns.highest),
                  end_seeing_all = mask.end_seeing(columns.lowest);
    with_cap(softcap, [&](const auto& cap) {
      for (int64_t m = 0; m < count; ++m) {
        const int64_t row = hidden + m, position = queries.positions[row];
        const bool masked = position < first_seeing_all || position >= end_seeing_all;
        for (int j = 0; j < NV; ++j) {
          const int64_t at = m * width + j * W<T>;
          const Vec<T> score = cap.score(load(scores + at));
          Vec<T> weight = exponential(score - queries.lse[row]);
          if (masked) weight = columns.seen(mask, j, position) ? weight : Vec<T>{};
          store(scores + at, weight);
          store(grads + at, weight * cap.gradient(score, load(grads + at) - queries.delta[row]));
        }
      }
    });
    if (queries.grad_q != nullptr)
      product<Into::Add, Left::RowMajor>(
          count, stride, queries.grad_q + hidden * stride, stride, grads, width, key_rows.data, key_rows.stride,
          columns.highest + 1 - columns.lowest);
    if (!owed) return;
    panel<Into::Add, Left::ColumnMajor, NV>(dim, grad_value, width, grad_out, stride, scores, width, count);
    panel<Into::Add, Left::ColumnMajor, NV>(dim, grad_key, width, q, stride, grads, width, count);
  }

  void end(const ColumnGradient<S>& p, const ColumnTile& tile, const Owed& owed) const {
    const int64_t last = smaller(columns.highest + 1, owed.end);
    for (int64_t column = larger(columns.lowest, owed.begin); column < last; ++column) {
      const int64_t lane = column - columns.lowest;
      T* keys = p.grad_keys.at(tile.row, tile.head, column);
      T* values = p.grad_values.at(tile.row, tile.head, column);
      for (int64_t d = 0; d < p.dim; ++d) {
        keys[d] += p.scale * grad_key[d * NV * W<T> + lane];
        values[d] += grad_value[d * NV * W<T> + lane];
      }
    }
  }
};

template <class S>
void read_queries(const ColumnGradient<S>& p, const ColumnTile& tile, int64_t first, QueryStep<Acc<S>>& step) {
  const int64_t stride = padded<Acc<S>>(p.dim);
  for (int64_t m = 0; m < step.count; ++m) {
    const QueryRow query = query_row(p, tile, first + m);
    read_row(step.q + m * stride, p.q.at(query.token, query.head), p.dim);
    read_row(step.grad_out + m * stride, p.grad_out.at(query.token, query.head), p.dim);
    step.lse[m] = *p.lse.at(query.token, query.head);
    step.delta[m] = *p.delta.at(query.token, query.head);
    step.positions[m] = query.position;
  }
}

/// Adds to the gradients of the tile's columns within `owed`, and to those of the queries, [rows, padded(dim)], where
/// `grad_q` is not null.
template <int NV, class S>
void column_panels(
    const ColumnGradient<S>& p, const ColumnTile& tile, const Owed& owed, Acc<S>* grad_q, Acc<S>* scratch) {
  using T = Acc<S>;
  const bool any = owed.begin < tile.end && tile.begin < owed.end;
  constexpr int64_t width = NV * W<T>;
  const int64_t start = p.rows.position(tile.row, 0), count_of = p.rows.count(tile.row);
  const int64_t rows = smaller(count_of, p.mask.end_seeing(tile.end - 1) - start) * p.group;
  const int64_t first = larger(0, p.mask.first_seeing(tile.begin) - start) * p.group;
  if (first >= rows) return;
  Panel<NV, S> panels[(TILE + width - 1) / width];
  QueryStep<T> queries;
  Pieces<T> pieces(scratch);
  T* scores = pieces.take(STEP * width);
  T* grads = pieces.take(STEP * width);
  T* row = pieces.take(padded<T>(p.dim));
  queries.q = pieces.take(STEP * padded<T>(p.dim));
  queries.grad_out = pieces.take(STEP * padded<T>(p.dim));
  queries.grad_q = nullptr;
  const int64_t count = (tile.end - tile.begin + width - 1) / width;
  for (int64_t i = 0; i < count; ++i) {
    panels[i].key = pieces.take(p.dim * width);
    panels[i].value = pieces.take(p.dim * width);
    panels[i].grad_key = pieces.take(p.dim * width);
    panels[i].grad_value = pieces.take(p.dim * width);
    T* spare = grad_q == nullptr ? nullptr : pieces.take(width * padded<T>(p.dim));
    panels[i].begin(p, tile, tile.begin + i * width, row, spare);
  }
  for (int64_t r = first; r < rows; r += STEP) {
    queries.count = smaller(STEP, rows - r);
    read_queries(p, tile, r, queries);
    if (grad_q != nullptr) queries.grad_q = grad_q + r * padded<T>(p.dim);
    for (int64_t i = 0; i < count; ++i) panels[i].step(queries, p.dim, any, scores, grads);
  }
  for (int64_t i = 0; any && i < count; ++i) panels[i].end(p, tile, owed);
}

template <class S>
void column_tile(
    const ColumnGradient<S>& p, const ColumnTile& tile, const Owed& owed, Acc<S>* grad_q, Acc<S>* scratch) {
  if (tile.end - tile.begin <= W<Acc<S>>)
    column_panels<1>(p, tile, owed, grad_q, scratch);
  else
    column_panels<VECTORS>(p, tile, owed, grad_q, scratch);
}

}  // namespace

template <class S>
void column_gradient(const ColumnGradient<S>& p, const ColumnTile& tile, Acc<S>* scratch) {
  column_tile<S>(p, tile, {tile.begin, tile.end}, nullptr, scratch);
}

template <class S>
void attention_gradient(const AttentionGradient<S>& p, const GradientTile& tile, Acc<S>* scratch) {
  const int64_t stride = padded<Acc<S>>(p.dim), rows = p.rows.count(tile.row) * p.group;
  // The cut does not depend on them, so neither do the queries' gradients, bit for bit.
  const Owed owed{p.column_begin[tile.row], p.column_end[tile.row]};
  Acc<S>* grad_q = p.partial + tile.partial * stride;
  fill(grad_q, rows * stride, Acc<S>(0));
  for (int64_t begin = tile.begin; begin < tile.end; begin += TILE)
    column_tile<S>(p, {tile.row, tile.head, begin, smaller(begin + TILE, tile.end)}, owed, grad_q, scratch);
}

template <class S>
void sum_query_gradients(const AttentionGradient<S>& p, const SplitTile& tile, Acc<S>* scratch) {
  using T = Acc<S>;
  const int64_t stride = padded<T>(p.dim), rows = p.rows.count(tile.row) * p.group;
  for (int64_t r = tile.first; r < tile.last; ++r) {
    const T* part = p.partial + (tile.partial + r) * stride;
    for (int64_t d = 0; d < stride; d += W<T>) {
      Vec<T> total = load(part + d);
      for (int64_t i = 1; i < tile.splits; ++i) total += load(part + i * rows * stride + d);
      store(scratch + d, total);
    }
    const QueryRow query = query_row(p, tile, r);
    write_row<S>(p.grad_q.at(query.token, query.head), scratch, p.dim, p.scale);
  }
}

template <class S>
void deltas(const Deltas<S>& p, int64_t begin, int64_t end, Acc<S>* scratch) {
  const int64_t stride = padded<Acc<S>>(p.dim);
  for (int64_t token = begin; token < end; ++token)
    for (int64_t head = 0; head < p.heads; ++head) {
      read_row(scratch, p.out.at(token, head), p.dim);
      read_row(scratch + stride, p.grad_out.at(token, head), p.dim);
      *p.delta.at(token, head) = dot(scratch, scratch + stride, stride);
    }
}

template <class S>
void own_column(const OwnColumn<S>& p, Acc<S>* scratch) {
  using T = Acc<S>;
  const int64_t stride = padded<T>(p.dim), rows = p.slots * p.group;
  Pieces<T> pieces(scratch);
  T* key = pieces.take(stride);
  T* value = pieces.take(stride);
  T* grad_key = pieces.take(stride);
  T* grad_value = pieces.take(stride);
  T* q = pieces.take(STEP * stride);
  T* grad_out = pieces.take(STEP * stride);
  T scores[STEP], grads[STEP];
  read_row(key, p.key, p.dim, p.scale);
  read_row(value, p.value, p.dim);
  fill(grad_key, stride, T(0));
  fill(grad_value, stride, T(0));
  for (int64_t r = 0; r < rows; r += STEP) {
    const int64_t count = smaller(STEP, rows - r);
    for (int64_t m = 0; m < count; ++m) {
      const int64_t slot = (r + m) / p.group, head = (r + m) % p.group;
      read_row(q + m * stride, p.q.at(slot, head), p.dim);
      read_row(grad_out + m * stride, p.grad_out.at(slot, head), p.dim);
    }
    dots(1, count, scores, STEP, key, stride, q, stride, stride);
    dots(1, count, grads, STEP, value, stride, grad_out, stride, stride);
    with_cap(p.softcap, [&](const auto& cap) {
      for (int64_t m = 0; m < count; ++m) {
        const int64_t slot = (r + m) / p.group, head = (r + m) % p.group;
        const Vec<T> score = cap.score(splat(scores[m]));
        scores[m] = exponential(score - *p.lse.at(slot, head))[0];
        grads[m] = scores[m] * cap.gradient(score, splat(grads[m] - *p.delta.at(slot, head)))[0];
      }
    });
    product<Into::Add, Left::RowMajor>(1, stride, grad_value, stride, scores, STEP, grad_out, stride, count);
    product<Into::Add, Left::RowMajor>(1, stride, grad_key, stride, grads, STEP, q, stride, count);
  }
  read_row(key, p.grad_key, p.dim);
  read_row(value, p.grad_value, p.dim);
  for (int64_t d = 0; d < stride; d += W<T>) {
    store(key + d, load(key + d) + load(grad_key + d) * p.scale);
    store(value + d, load(value + d) + load(grad_value + d));
  }
  write_row(p.grad_k, key, p.dim);
  write_row(p.grad_v, value, p.dim);
}

#define INSTANTIATE(S)                                                                            \
  template void column_gradient<S>(const ColumnGradient<S>&, const ColumnTile&, Acc<S>*);         \
  template void attention_gradient<S>(const AttentionGradient<S>&, const GradientTile&, Acc<S>*); \
  template void sum_query_gradients<S>(const AttentionGradient<S>&, const SplitTile&, Acc<S>*);   \
  template void deltas<S>(const Deltas<S>&, int64_t, int64_t, Acc<S>*);                           \
  template void own_column<S>(const OwnColumn<S>&, Acc<S>*);
DIFFMAS_FOR_STORAGE_TYPES(INSTANTIATE)

}  // namespace DIFFMAS_ISA
}  // namespace diffmas

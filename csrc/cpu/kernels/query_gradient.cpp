// Gradient of the queries: one pass over the columns, scores recomputed (arXiv 2307.08691, algorithm 2).
#include "cpu/kernels/attention.h"

namespace diffmas {
namespace DIFFMAS_ISA {

namespace {

/// Reads a row of grad_out into `grad` (of out into `row`) and records delta, their dot product.
template <class S>
Acc<S> begin_row(const QueryGradient<S>& p, const QueryRow& query, Acc<S>* grad, Acc<S>* row) {
  read_row(row, p.out.at(query.token, query.head), p.dim);
  read_row(grad, p.grad_out.at(query.token, query.head), p.dim);
  // Every part of a split tile writes the same value.
  return *p.delta.at(query.token, query.head) = dot(row, grad, padded<Acc<S>>(p.dim));
}

template <class S>
void write_result(const QueryGradient<S>& p, const QueryTile& tile, int64_t row, const Acc<S>* grad) {
  if (tile.partial >= 0) {
    write_row<Acc<S>>(p.partial + (tile.partial + row - tile.first) * p.dim, grad, p.dim, p.scale);
  } else {
    const QueryRow query = query_row(p, tile, row);
    write_row<S>(p.grad_q.at(query.token, query.head), grad, p.dim, p.scale);
  }
}

template <class S>
void narrow(const QueryGradient<S>& p, const QueryTile& tile, Acc<S>* scratch) {
  using T = Acc<S>;
  const int64_t rows = tile.last - tile.first, stride = padded<T>(p.dim);
  Pieces<T> pieces(scratch);
  T* q = pieces.take(NARROW * stride);
  T* grad_out = pieces.take(NARROW * stride);
  T* grad_q = pieces.take(NARROW * stride);
  T* scores = pieces.take(NARROW * STEP);
  T* grads = pieces.take(NARROW * STEP);
  T* spare = pieces.take(STEP * stride);
  T lse[NARROW], delta[NARROW];
  int64_t positions[NARROW];
  for (int64_t r = 0; r < rows; ++r) {
    const QueryRow query = query_row(p, tile, tile.first + r);
    delta[r] = begin_row(p, query, grad_out + r * stride, q + r * stride);
    lse[r] = *p.lse.at(query.token, query.head);
    positions[r] = query.position;
    read_row(q + r * stride, p.q.at(query.token, query.head), p.dim, p.scale);
  }
  fill(grad_q, rows * stride, T(0));
  for (int64_t c = tile.column_begin; c < tile.column_end; c += STEP) {
    const int64_t count = smaller(STEP, tile.column_end - c);
    const S *keys = p.keys.at(tile.row, tile.head, c), *values = p.values.at(tile.row, tile.head, c);
    in_vectors(keys, p.keys.column_stride, count, p.dim, spare, [&](const auto* key_rows, int64_t key_stride) {
      dots(rows, count, scores, STEP, q, stride, key_rows, key_stride, stride);
    });
    in_vectors(values, p.values.column_stride, count, p.dim, spare, [&](const auto* value_rows, int64_t value_stride) {
      dots(rows, count, grads, STEP, grad_out, stride, value_rows, value_stride, stride);
    });
    for (int64_t r = 0; r < rows; ++r) {
      T *s = scores + r * STEP, *g = grads + r * STEP;
      cap_scores(s, count, p.softcap);
      const int64_t begin = p.mask.first_seen(positions[r]) - c, end = p.mask.end_seen(positions[r]) - c;
      for (int64_t n = 0; n < smaller(count, begin); ++n) s[n] = -infinity<T>();
      for (int64_t n = larger(0, smaller(count, end)); n < count; ++n) s[n] = -infinity<T>();
      with_cap(p.softcap, [&](const auto& cap) {
        for (int64_t n = 0; n < count; n += W<T>)
          store(g + n, exponential(load(s + n) - lse[r]) * cap.gradient(load(s + n), load(g + n) - delta[r]));
      });
    }
    in_vectors(keys, p.keys.column_stride, count, p.dim, spare, [&](const auto* key_rows, int64_t key_stride) {
      product<Into::Add, Left::RowMajor>(rows, stride, grad_q, stride, grads, STEP, key_rows, key_stride, count);
    });
  }
  for (int64_t r = 0; r < rows; ++r) write_result(p, tile, tile.first + r, grad_q + r * stride);
}

template <int NV, class S>
struct Panel {
  using T = Acc<S>;
  T *q, *grad_out, *grad_q;  // [dim, NV * W]
  LanePositions<NV, T> positions;
  Mask mask;
  T softcap;
  Vec<T> lse[NV], delta[NV];

  void begin(const QueryGradient<S>& p, const QueryTile& tile, int64_t first, T* row, T* grad) {
    constexpr int64_t width = NV * W<T>;
    fill(grad_q, p.dim * width, T(0));
    mask = p.mask;
    softcap = p.softcap;
    const int64_t count = smaller(width, tile.last - first);
    for (int64_t lane = 0; lane < width; ++lane) {
      // Lanes beyond the tile repeat its last row, and their result is not written.
      const QueryRow query = query_row(p, tile, first + smaller(lane, count - 1));
      positions.set(lane, query.position);
      delta[lane / W<T>][lane % W<T>] = begin_row(p, query, grad, row);
      lse[lane / W<T>][lane % W<T>] = *p.lse.at(query.token, query.head);
      read_row(row, p.q.at(query.token, query.head), p.dim, p.scale);
      scatter_lane<NV>(q, lane, row, p.dim);
      scatter_lane<NV>(grad_out, lane, grad, p.dim);
    }
    positions.lowest = query_row(p, tile, first).position;
    positions.highest = query_row(p, tile, first + count - 1).position;
  }

  void step(
      const Tile<T>& keys, const Tile<T>& values, int64_t column, int64_t count, int64_t dim, T* scores, T* grads) {
    constexpr int64_t width = NV * W<T>;
    count = smaller(count, mask.end_seen(positions.highest) - column);
    if (count <= 0 || column + count <= mask.first_seen(positions.lowest)) return;
    panel<Into::Overwrite, Left::RowMajor, NV>(count, scores, width, keys.data, keys.stride, q, width, dim);
    panel<Into::Overwrite, Left::RowMajor, NV>(count, grads, width, values.data, values.stride, grad_out, width, dim);
    const bool masked = column + count > mask.end_seen(positions.lowest) || column < mask.first_seen(positions.highest);
    with_cap(softcap, [&](const auto& cap) {
      for (int64_t n = 0; n < count; ++n)
        for (int j = 0; j < NV; ++j) {
          const int64_t at = n * width + j * W<T>;
          const Vec<T> score = cap.score(load(scores + at));
          Vec<T> grad = exponential(score - lse[j]) * cap.gradient(score, load(grads + at) - delta[j]);
          if (masked) grad = positions.see(mask, j, column + n) ? grad : Vec<T>{};
          store(grads + at, grad);
        }
    });
    panel<Into::Add, Left::ColumnMajor, NV>(dim, grad_q, width, keys.data, keys.stride, grads, width, count);
  }
};

template <int NV, class S>
void wide(const QueryGradient<S>& p, const QueryTile& tile, Acc<S>* scratch) {
  using T = Acc<S>;
  constexpr int64_t width = NV * W<T>;
  Panel<NV, S> panels[(TILE + width - 1) / width];
  Pieces<T> pieces(scratch);
  T* scores = pieces.take(STEP * width);
  T* grads = pieces.take(STEP * width);
  T* row = pieces.take(padded<T>(p.dim));
  T* grad = pieces.take(padded<T>(p.dim));
  T* key_rows = pieces.take(STEP * padded<T>(p.dim));
  T* value_rows = pieces.take(STEP * padded<T>(p.dim));
  const int64_t count = (tile.last - tile.first + width - 1) / width;
  for (int64_t i = 0; i < count; ++i) {
    panels[i].q = pieces.take(p.dim * width);
    panels[i].grad_out = pieces.take(p.dim * width);
    panels[i].grad_q = pieces.take(p.dim * width);
    panels[i].begin(p, tile, tile.first + i * width, row, grad);
  }
  for (int64_t c = tile.column_begin; c < tile.column_end; c += STEP) {
    const int64_t columns = smaller(STEP, tile.column_end - c);
    const auto keys = as_tile(p.keys.at(tile.row, tile.head, c), p.keys.column_stride, columns, p.dim, key_rows);
    const auto values =
        as_tile(p.values.at(tile.row, tile.head, c), p.values.column_stride, columns, p.dim, value_rows);
    for (int64_t i = 0; i < count; ++i) panels[i].step(keys, values, c, columns, p.dim, scores, grads);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = tile.first + i * width;
    for (int64_t lane = 0; lane < smaller(width, tile.last - first); ++lane) {
      gather_lane<NV>(row, panels[i].grad_q, lane, p.dim);
      write_result(p, tile, first + lane, row);
    }
  }
}

}  // namespace

template <class S>
void query_gradient(const QueryGradient<S>& p, const QueryTile& tile, Acc<S>* scratch) {
  const int64_t rows = tile.last - tile.first;
  if (rows <= NARROW)
    narrow(p, tile, scratch);
  else if (rows <= W<Acc<S>>)
    wide<1>(p, tile, scratch);
  else
    wide<VECTORS>(p, tile, scratch);
}

template <class S>
void sum_partials(const QueryGradient<S>& p, const SplitTile& tile, Acc<S>* scratch) {
  using T = Acc<S>;
  const int64_t rows = tile.last - tile.first;
  T* part = scratch + padded<T>(p.dim);
  for (int64_t r = 0; r < rows; ++r) {
    const T* source = p.partial + (tile.partial + r) * p.dim;
    read_row(scratch, source, p.dim);
    for (int64_t s = 1; s < tile.splits; ++s) {
      read_row(part, source + s * rows * p.dim, p.dim);
      for (int64_t d = 0; d < p.dim; d += W<T>) store(scratch + d, load(scratch + d) + load(part + d));
    }
    const QueryRow query = query_row(p, tile, tile.first + r);
    write_row<S>(p.grad_q.at(query.token, query.head), scratch, p.dim);
  }
}

#define INSTANTIATE(S)                                                                 \
  template void query_gradient<S>(const QueryGradient<S>&, const QueryTile&, Acc<S>*); \
  template void sum_partials<S>(const QueryGradient<S>&, const SplitTile&, Acc<S>*);
DIFFMAS_FOR_STORAGE_TYPES(INSTANTIATE)

}  // namespace DIFFMAS_ISA
}  // namespace diffmas

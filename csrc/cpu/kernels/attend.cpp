// Forward attention: online softmax over column steps, after FlashAttention-2 (arXiv 2307.08691, algorithm 1).
#include "cpu/kernels/attention.h"

namespace diffmas {
namespace DIFFMAS_ISA {

namespace {

/// The normalised result of one query row of a tile; `out` is readable up to padded(dim).
template <class S>
void write_result(
    const Attend<S>& p, const QueryTile& tile, int64_t row, const Acc<S>* out, Acc<S> maximum, Acc<S> total) {
  using T = Acc<S>;
  const T factor = total > 0 ? 1 / total : T(0);
  const T lse = total > 0 ? maximum + logarithm(total) : -infinity<T>();
  if (tile.partial >= 0) {
    const int64_t target = tile.partial + row - tile.first;
    write_row<T>(p.partial_out + target * p.dim, out, p.dim, factor);
    p.partial_lse[target] = lse;
  } else {
    const QueryRow query = query_row(p, tile, row);
    write_row<S>(p.out.at(query.token, query.head), out, p.dim, factor);
    *p.lse.at(query.token, query.head) = lse;
  }
}

/// Few query rows: the scores of all columns of the tile first, then one pass over the values.
template <class S>
void attend_narrow(const Attend<S>& p, const QueryTile& tile, Acc<S>* scratch) {
  using T = Acc<S>;
  const int64_t rows = tile.last - tile.first, stride = padded<T>(p.dim);
  const int64_t columns = tile.column_end - tile.column_begin;
  Pieces<T> pieces(scratch);
  T* q = pieces.take(NARROW * stride);
  T* out = pieces.take(NARROW * stride);
  T* scores = pieces.take(NARROW * NARROW_COLUMNS);
  T* spare = pieces.take(STEP * stride);

  for (int64_t r = 0; r < rows; ++r) {
    const QueryRow query = query_row(p, tile, tile.first + r);
    read_row(q + r * stride, p.q.at(query.token, query.head), p.dim, p.scale);
  }
  for (int64_t c = 0; c < columns; c += STEP) {
    const int64_t count = smaller(STEP, columns - c);
    const S* keys = p.keys.at(tile.row, tile.head, tile.column_begin + c);
    in_vectors(keys, p.keys.column_stride, count, p.dim, spare, [&](const auto* key_rows, int64_t key_stride) {
      dots(rows, count, scores + c, NARROW_COLUMNS, q, stride, key_rows, key_stride, stride);
    });
  }
  for (int64_t r = 0; r < rows; ++r) cap_scores(scores + r * NARROW_COLUMNS, columns, p.softcap);

  T maxima[NARROW], totals[NARROW];
  for (int64_t r = 0; r < rows; ++r) {
    T* s = scores + r * NARROW_COLUMNS;
    const int64_t position = query_row(p, tile, tile.first + r).position;
    const int64_t end = larger(0, smaller(columns, p.mask.end_seen(position) - tile.column_begin));
    const int64_t begin = smaller(end, larger(0, p.mask.first_seen(position) - tile.column_begin));
    for (int64_t c = 0; c < begin; ++c) s[c] = -infinity<T>();
    for (int64_t c = end; c < padded<T>(columns); ++c) s[c] = -infinity<T>();
    Vec<T> top = splat(-infinity<T>());
    for (int64_t c = 0; c < columns; c += W<T>) top = maximum<T>(load(s + c), top);
    maxima[r] = largest<T>(top);
    const Vec<T> base = splat(begin < end ? maxima[r] : T(0));
    Vec<T> total{};
    for (int64_t c = 0; c < columns; c += W<T>) {
      const Vec<T> weight = exponential(load(s + c) - base);
      total += weight;
      store(s + c, weight);
    }
    totals[r] = sum<T>(total);
  }

  fill(out, rows * stride, T(0));
  for (int64_t c = 0; c < columns; c += STEP) {
    const int64_t count = smaller(STEP, columns - c);
    const S* values = p.values.at(tile.row, tile.head, tile.column_begin + c);
    in_vectors(values, p.values.column_stride, count, p.dim, spare, [&](const auto* value_rows, int64_t value_stride) {
      product<Into::Add, Left::RowMajor>(
          rows, stride, out, stride, scores + c, NARROW_COLUMNS, value_rows, value_stride, count);
    });
  }
  for (int64_t r = 0; r < rows; ++r) write_result(p, tile, tile.first + r, out + r * stride, maxima[r], totals[r]);
}

template <int NV, class S>
struct Panel {
  using T = Acc<S>;
  T *q, *out;  // [dim, NV * W]
  LanePositions<NV, T> positions;
  Mask mask;
  T softcap;
  Vec<T> top[NV], total[NV];

  void begin(const Attend<S>& p, const QueryTile& tile, int64_t first, T* row) {
    constexpr int64_t width = NV * W<T>;
    fill(out, p.dim * width, T(0));
    mask = p.mask;
    softcap = p.softcap;
    const int64_t count = smaller(width, tile.last - first);
    for (int64_t lane = 0; lane < width; ++lane) {
      // Lanes beyond the tile repeat its last position and have a zero query.
      const QueryRow query = query_row(p, tile, first + smaller(lane, count - 1));
      positions.set(lane, query.position);
      if (lane < count)
        read_row(row, p.q.at(query.token, query.head), p.dim, p.scale);
      else
        fill(row, p.dim, T(0));
      scatter_lane<NV>(q, lane, row, p.dim);
    }
    positions.lowest = query_row(p, tile, first).position;
    positions.highest = query_row(p, tile, first + count - 1).position;
    for (int j = 0; j < NV; ++j) {
      top[j] = splat(-infinity<T>());
      total[j] = Vec<T>{};
    }
  }

  void step(const Tile<T>& keys, const Tile<T>& values, int64_t column, int64_t count, int64_t dim, T* scores) {
    constexpr int64_t width = NV * W<T>;
    count = smaller(count, mask.end_seen(positions.highest) - column);
    if (count <= 0 || column + count <= mask.first_seen(positions.lowest)) return;
    panel<Into::Overwrite, Left::RowMajor, NV>(count, scores, width, keys.data, keys.stride, q, width, dim);
    cap_scores(scores, count * width, softcap);
    const int64_t seen_by_all =
        column < mask.first_seen(positions.highest) ? 0 : mask.end_seen(positions.lowest) - column;
    if (seen_by_all < count)
      for (int64_t n = larger(0, seen_by_all); n < count; ++n)
        for (int j = 0; j < NV; ++j) {
          T* s = scores + n * width + j * W<T>;
          store(s, positions.see(mask, j, column + n) ? load(s) : splat(-infinity<T>()));
        }
    Vec<T> base[NV], shrink[NV];
    for (int j = 0; j < NV; ++j) base[j] = top[j];
    for (int64_t n = 0; n < count; ++n)
      for (int j = 0; j < NV; ++j) base[j] = maximum<T>(load(scores + n * width + j * W<T>), base[j]);
    for (int j = 0; j < NV; ++j) {
      shrink[j] = exponential(top[j] - (base[j] == -infinity<T>() ? Vec<T>{} : base[j]));
      top[j] = base[j];
      base[j] = base[j] == -infinity<T>() ? Vec<T>{} : base[j];
      total[j] *= shrink[j];
    }
    for (int64_t n = 0; n < count; ++n)
      for (int j = 0; j < NV; ++j) {
        T* s = scores + n * width + j * W<T>;
        const Vec<T> weight = exponential(load(s) - base[j]);
        total[j] += weight;
        store(s, weight);
      }
    for (int64_t d = 0; d < dim; ++d)
      for (int j = 0; j < NV; ++j) store(out + d * width + j * W<T>, load(out + d * width + j * W<T>) * shrink[j]);
    panel<Into::Add, Left::ColumnMajor, NV>(dim, out, width, values.data, values.stride, scores, width, count);
  }

  void end(const Attend<S>& p, const QueryTile& tile, int64_t first, T* row) {
    for (int64_t lane = 0; lane < smaller(NV * W<T>, tile.last - first); ++lane) {
      gather_lane<NV>(row, out, lane, p.dim);
      write_result(p, tile, first + lane, row, top[lane / W<T>][lane % W<T>], total[lane / W<T>][lane % W<T>]);
    }
  }
};

template <int NV, class S>
void attend_panels(const Attend<S>& p, const QueryTile& tile, Acc<S>* scratch) {
  using T = Acc<S>;
  constexpr int64_t width = NV * W<T>;
  Panel<NV, S> panels[(TILE + width - 1) / width];
  Pieces<T> pieces(scratch);
  T* scores = pieces.take(STEP * width);
  T* row = pieces.take(padded<T>(p.dim));
  T* key_rows = pieces.take(STEP * padded<T>(p.dim));
  T* value_rows = pieces.take(STEP * padded<T>(p.dim));
  const int64_t count = (tile.last - tile.first + width - 1) / width;
  for (int64_t i = 0; i < count; ++i) {
    panels[i].q = pieces.take(p.dim * width);
    panels[i].out = pieces.take(p.dim * width);
    panels[i].begin(p, tile, tile.first + i * width, row);
  }
  for (int64_t c = tile.column_begin; c < tile.column_end; c += STEP) {
    const int64_t columns = smaller(STEP, tile.column_end - c);
    const auto keys = as_tile(p.keys.at(tile.row, tile.head, c), p.keys.column_stride, columns, p.dim, key_rows);
    const auto values =
        as_tile(p.values.at(tile.row, tile.head, c), p.values.column_stride, columns, p.dim, value_rows);
    for (int64_t i = 0; i < count; ++i) panels[i].step(keys, values, c, columns, p.dim, scores);
  }
  for (int64_t i = 0; i < count; ++i) panels[i].end(p, tile, tile.first + i * width, row);
}

}  // namespace

template <class S>
void attend(const Attend<S>& p, const QueryTile& tile, Acc<S>* scratch) {
  const int64_t rows = tile.last - tile.first;
  if (rows <= NARROW)
    attend_narrow(p, tile, scratch);
  else if (rows <= W<Acc<S>>)
    attend_panels<1>(p, tile, scratch);
  else
    attend_panels<VECTORS>(p, tile, scratch);
}

#define INSTANTIATE(S) template void attend<S>(const Attend<S>&, const QueryTile&, Acc<S>*);
DIFFMAS_FOR_STORAGE_TYPES(INSTANTIATE)

}  // namespace DIFFMAS_ISA
}  // namespace diffmas

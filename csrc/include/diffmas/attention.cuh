// What the attention kernels share: their arguments, how the query heads of a group become rows of one tile, and which
// block works on which rows and columns.
#pragma once

#include "diffmas/device.cuh"
#include "diffmas/mask.h"

namespace diffmas {

/// How query heads sharing a kv head, a group, and columns are dealt out to blocks.
/// Unsplit: grid (tiles, kv heads, batch), each block sees all columns of its rows.
/// Split: grid (tiles, kv heads, slots); a slot is one chunk of columns of one batch row, see `find_chunk`.
struct WorkPlan {
  RowRanges rows;
  int batch;
  int slots;  // 0: unsplit
  Divisor group;
  Mask mask;
};

/// What stands between a scaled product and the softmax: cap tanh(s / cap), or nothing where cap is 0. Any unit of
/// logarithms will do, if it is the cap's as well.
template <class A>
struct SoftCap {
  A cap;

  __device__ __forceinline__ A score(A scaled) const { return cap > 0 ? cap * tanh(scaled / cap) : scaled; }
  /// The gradient of the scaled product, given that of its score.
  __device__ __forceinline__ A gradient(A score, A grad) const {
    if (cap <= 0) return grad;
    const A t = score / cap;
    return grad * (1 - t * t);
  }
};

template <class T>
struct AttentionInputs {
  Packed<const T> q;
  Trace<const T> keys, values;
  WorkPlan plan;
  int dim;
  Acc<T> scale;
  SoftCap<Acc<T>> softcap;
};

/// Results of the slots before they are merged: out [slots, kv heads, packed rows, dim], lse [slots, kv heads, packed
/// rows].
template <class A>
struct Partials {
  A *out, *lse;
  int heads, packed_rows, dim;

  DIFFMAS_HD int64_t index(int64_t slot, int64_t head, int64_t packed_row) const {
    return (slot * heads + head) * packed_rows + packed_row;
  }
};

/// Columns [begin, end) of one batch row; `slots` and `first_slot` are those of all the row's chunks. row = -1: nothing
/// to do.
struct Chunk {
  int row, begin, end, first_slot, slots;
};

/// Chunks are whole multiples of this many columns.
constexpr int CHUNK_COLUMNS = 64;
/// Below this, a chunk is not worth the merge it causes.
constexpr int MIN_CHUNK_COLUMNS = 128;

/// Columns begin … end - 1.
struct Span {
  int begin, end;
};

/// Those that some query of a batch row sees.
DIFFMAS_HD Span seen_columns(const WorkPlan& plan, int row) {
  const int64_t count = plan.rows.count(row);
  if (count <= 0) return {0, 0};
  const int64_t first = plan.mask.first_seen(plan.rows.position(row, 0));
  return {static_cast<int>(first), static_cast<int>(plan.mask.end_seen(plan.rows.position(row, count - 1)))};
}

/// The chunk in `slot`, or, where slot < 0, the first chunk of `row`. All lanes of a warp call this together. Rows are
/// cut into chunks of one size for the whole batch, chosen from the lengths on the device so that all chunks fit in the
/// slots and long rows take more of them than short ones.
__device__ __forceinline__ Chunk find_chunk(const WorkPlan& plan, int slot, int row) {
  const int lane = threadIdx.x % 32;
  int64_t total = 0;
  for (int b = lane; b < plan.batch; b += 32) {
    const Span seen = seen_columns(plan, b);
    total += seen.end - seen.begin;
  }
  total = warp_sum(total);
  // Rounding up costs every row less than one more chunk, hence the slots set aside.
  int64_t size = divide_up(total, plan.slots - plan.batch);
  size = divide_up(size, CHUNK_COLUMNS) * CHUNK_COLUMNS;
  size = size < MIN_CHUNK_COLUMNS ? MIN_CHUNK_COLUMNS : size;
  int before = 0;
  for (int first = 0; first < plan.batch; first += 32) {
    const int b = first + lane;
    const Span seen = b < plan.batch ? seen_columns(plan, b) : Span{0, 0};
    const int count = static_cast<int>(divide_up(seen.end - seen.begin, size));
    int through = count;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(ALL_LANES, through, offset);
      if (lane >= offset) through += other;
    }
    const int own = before + through - count;
    const bool hit = slot < 0 ? b == row : own <= slot && slot < own + count;
    const unsigned hits = __ballot_sync(ALL_LANES, hit);
    if (hits != 0) {
      const int source = __ffs(hits) - 1;
      Chunk chunk;
      chunk.row = first + source;
      chunk.first_slot = __shfl_sync(ALL_LANES, own, source);
      chunk.slots = __shfl_sync(ALL_LANES, count, source);
      const int end = __shfl_sync(ALL_LANES, seen.end, source);
      const int64_t first = __shfl_sync(ALL_LANES, seen.begin, source);
      const int64_t begin = first + (slot < 0 ? 0 : slot - chunk.first_slot) * size;
      chunk.begin = static_cast<int>(begin);
      chunk.end = begin + size < end ? static_cast<int>(begin + size) : end;
      return chunk;
    }
    before += __shfl_sync(ALL_LANES, through, 31);
  }
  return {-1, 0, 0, 0, 0};
}

/// Query rows of one (batch row, kv head): packed row r is token r / group and query head r % group of the group, so
/// that one read of K and V serves all of them. A tile starts at packed row `first`; r below counts within the tile.
struct QueryRows {
  int64_t token, head;
  int start, first, count;
  Divisor group;
  Mask mask;

  QueryRows() = default;
  __device__ __forceinline__ QueryRows(const WorkPlan& plan, int row, int kv_head, int first)
      : token(plan.rows.begin[row]),
        head(int64_t(kv_head) * plan.group.value),
        start(plan.rows.starts[row]),
        first(first),
        count(static_cast<int>(plan.rows.count(row)) * static_cast<int>(plan.group.value)),
        group(plan.group),
        mask(plan.mask) {}

  DIFFMAS_HD bool valid(int r) const { return first + r < count; }
  /// The first column that row r sees, and the one behind the last.
  DIFFMAS_HD int first_seen(int r) const { return static_cast<int>(mask.first_seen(position(r))); }
  DIFFMAS_HD int end_seen(int r) const { return static_cast<int>(mask.end_seen(position(r))); }
  DIFFMAS_HD bool sees(int r, int column) const { return first_seen(r) <= column && column < end_seen(r); }
  DIFFMAS_HD int position(int r) const { return start + static_cast<int>(group.quotient(first + r)); }

  /// Leaves out the rows behind the last one that sees some of `columns`; returns how many before the first do not.
  DIFFMAS_HD int keep_seeing(Span columns) {
    const int64_t group_size = group.value, skipped = (mask.first_seeing(columns.begin) - start) * group_size;
    const int64_t end = (mask.end_seeing(columns.end - 1) - start) * group_size;
    count = end < count ? static_cast<int>(end) : count;
    return skipped < 0 ? 0 : skipped < count ? static_cast<int>(skipped) : count;
  }

  template <class T>
  DIFFMAS_HD T* at(const Packed<T>& data, int r) const {
    const uint32_t i = group.quotient(first + r);
    return data.at(token + i, head + (first + r - i * group.value));
  }
};

/// What one block of an attention kernel does: a tile of query rows against the columns [begin, end).
struct Work {
  QueryRows rows;
  int row, kv_head, begin, end;
  int slot;    // of the partial result, or -1: the result is final
  bool first;  // of the blocks that share the tile

  /// False where there is nothing to do. All lanes of a warp call this together; `z` is the batch row or the slot.
  __device__ __forceinline__ bool find(const WorkPlan& plan, int z, int tile_rows) {
    const int tile = blockIdx.x * tile_rows;
    kv_head = blockIdx.y;
    Chunk chunk{z, 0, 0, 0, 0};
    if (plan.slots > 0) {
      chunk = find_chunk(plan, z, -1);
    } else {
      const Span seen = seen_columns(plan, z);
      chunk.begin = seen.begin;
      chunk.end = seen.end;
    }
    if (chunk.row < 0) return false;
    row = chunk.row;
    rows = QueryRows(plan, row, kv_head, tile);
    if (!rows.valid(0)) return false;
    first = plan.slots == 0 || z == chunk.first_slot;
    slot = chunk.slots > 1 ? z : -1;
    // No row of the tile sees a column before those of its first one, or behind those of its last one.
    const int last = rows.first + tile_rows < rows.count ? tile_rows - 1 : rows.count - 1 - rows.first;
    begin = max(chunk.begin, rows.first_seen(0));
    end = max(begin, min(chunk.end, rows.end_seen(last)));
    return true;
  }
};

}  // namespace diffmas

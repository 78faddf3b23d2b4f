// latent_project and its backward: products with the weight, streamed once by many blocks that each take a part of its
// columns and of the sum. Up to 16 rows are finished by the same launch, by whichever block comes last; more rows, and
// what is not for the tensor cores, by a second kernel.
#pragma once

#include "diffmas/tiles.cuh"

namespace diffmas {

/// The rows of two matrices of one shape, one under the other.
template <class T>
struct StackedRows {
  const T *upper, *lower;
  int64_t upper_stride, lower_stride;
  int upper_rows, rows;

  DIFFMAS_HD const T* at(int r) const {
    return r < upper_rows ? upper + r * upper_stride : lower + (r - upper_rows) * lower_stride;
  }
};

/// Y [rows, size] = X W, or X W^T, as `gridDim.y` parts to be added up: parts [gridDim.y, rows, size].
template <class T>
struct ProductArguments {
  StackedRows<T> x;
  const T* weight;
  int64_t weight_stride;
  int size;
  Acc<T>* parts;

  DIFFMAS_HD int64_t part(int64_t split, int64_t row) const { return (split * x.rows + row) * size; }
};

/// Rows of a product given in parts; or, without a product (`splits` 0), the rows themselves.
template <class T>
struct ProductRows {
  ProductArguments<T> product;
  int splits;

  /// Adds up the parts of N neighbouring elements and keeps the sums in the place of the first part.
  template <int N>
  __device__ __forceinline__ Vector<Acc<T>, N> collect(int row, int c) const {
    if (splits == 0) return read<N>(row, c);
    Vector<Acc<T>, N> sum{};
#pragma unroll 8
    for (int s = 0; s < splits; ++s) {
      const auto part = *reinterpret_cast<const Vector<Acc<T>, N>*>(product.parts + product.part(s, row) + c);
#pragma unroll
      for (int e = 0; e < N; ++e) sum.element[e] += part.element[e];
    }
    *reinterpret_cast<Vector<Acc<T>, N>*>(product.parts + product.part(0, row) + c) = sum;
    return sum;
  }

  /// Elements that have been collected.
  template <int N>
  __device__ __forceinline__ Vector<Acc<T>, N> read(int row, int c) const {
    if (splits == 0) return load<N>(product.x.at(row) + c);
    return *reinterpret_cast<const Vector<Acc<T>, N>*>(product.parts + product.part(0, row) + c);
  }

  template <int N>
  static __device__ __forceinline__ Vector<Acc<T>, N> load(const T* source) {
    const auto stored = *reinterpret_cast<const Vector<T, N>*>(source);
    Vector<Acc<T>, N> x;
#pragma unroll
    for (int e = 0; e < N; ++e) x.element[e] = accurate(stored.element[e]);
    return x;
  }

  template <int N>
  static __device__ __forceinline__ void store(T* target, const Vector<Acc<T>, N>& x) {
    Vector<T, N> stored;
#pragma unroll
    for (int e = 0; e < N; ++e) stored.element[e] = rounded<T>(x.element[e]);
    *reinterpret_cast<Vector<T, N>*>(target) = stored;
  }
};

/// How the rows y = x W are finished: every row to norm `target_norm`. A row's elements need the sum of all its terms.
template <class T>
struct Rescale {
  static constexpr bool TRANSPOSED = false;
  T* out;
  Acc<T>*norm, target_norm;
  int rows;

  template <int N>
  __device__ __forceinline__ Acc<T> term(const ProductRows<T>& y, int row, int c) const {
    const auto x = y.template read<N>(row, c);
    Acc<T> square = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) square += x.element[e] * x.element[e];
    return square;
  }

  /// What `store` needs of the product.
  template <int N>
  using Loaded = Vector<Acc<T>, N>;

  template <int N>
  __device__ __forceinline__ Loaded<N> load(const ProductRows<T>& y, int row, int c) const {
    return y.template read<N>(row, c);
  }

  template <int N>
  __device__ __forceinline__ void store(const ProductRows<T>& y, int row, int c, Acc<T> total, Loaded<N> x) const {
    const Acc<T> length = sqrt(total), scale = length > 0 ? target_norm / length : Acc<T>(0);
    if (c == 0) norm[row] = length;
#pragma unroll
    for (int e = 0; e < N; ++e) x.element[e] *= scale;
    y.template store<N>(out + int64_t(row) * y.product.size + c, x);
  }
};

/// With u = out / target_norm and s = target_norm / norm, dy = s (g - u (u·g)). The product's rows are those of g W^T,
/// and under them those of out W^T, so that no operand of the product was rounded; without a product, g and out
/// themselves. Stores dy W^T and, where `grad_y` is not null, dy.
template <class T>
struct RescaleBackward {
  static constexpr bool TRANSPOSED = true;
  const Acc<T>* norm;
  Acc<T> target_norm;
  T* grad_hidden;
  Acc<T>* grad_y;
  int rows;

  template <int N>
  __device__ __forceinline__ Acc<T> term(const ProductRows<T>& y, int row, int c) const {
    const auto grad = y.template load<N>(y.product.x.at(row) + c);
    const auto out = y.template load<N>(y.product.x.at(rows + row) + c);
    Acc<T> dot = 0;
#pragma unroll
    for (int e = 0; e < N; ++e) dot += out.element[e] * grad.element[e];
    return dot;
  }

  template <int N>
  struct Loaded {
    Vector<Acc<T>, N> grad, out;
  };

  template <int N>
  __device__ __forceinline__ Loaded<N> load(const ProductRows<T>& y, int row, int c) const {
    return {y.template read<N>(row, c), y.template read<N>(rows + row, c)};
  }

  template <int N>
  __device__ __forceinline__ void store(
      const ProductRows<T>& y, int row, int c, Acc<T> total, const Loaded<N>& loaded) const {
    const Acc<T> scale = norm[row] > 0 ? target_norm / norm[row] : Acc<T>(0);
    const Acc<T> along = scale * (total / target_norm / target_norm);
    const auto difference = [&](Vector<Acc<T>, N> grad, const Vector<Acc<T>, N>& out) {
#pragma unroll
      for (int e = 0; e < N; ++e) grad.element[e] = scale * grad.element[e] - along * out.element[e];
      return grad;
    };
    const int64_t at = int64_t(row) * y.product.size + c;
    y.template store<N>(grad_hidden + at, difference(loaded.grad, loaded.out));
    if (grad_y == nullptr) return;
    const T *grad = y.product.x.at(row) + c, *out = y.product.x.at(rows + row) + c;
    *reinterpret_cast<Vector<Acc<T>, N>*>(grad_y + at) = difference(y.template load<N>(grad), y.template load<N>(out));
  }
};

/// Counters of the launches that finish their own rows: arrivals of the splits at every tile of columns, and of the
/// tiles. All zero before and after a launch; launches in flight at the same time use different slots.
constexpr int COUNTER_SLOTS = 1024, MAX_COUNTED_TILES = 256;
static __device__ unsigned arrivals[COUNTER_SLOTS][MAX_COUNTED_TILES + 1];

/// Whether this block is the last of `count` to come here. What the others wrote before is visible to it then.
__device__ __forceinline__ bool last_arrival(unsigned& counter, unsigned count) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicInc(&counter, count - 1) == count - 1;  // which leaves zero
    __threadfence();
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

constexpr int PRODUCT_THREADS = 128, PRODUCT_COLUMNS = 64, PRODUCT_DEPTH = 64;

/// Terms [begin, end) of the sum that this block adds up, a multiple of PRODUCT_DEPTH apart.
struct SplitSum {
  int begin, end;
  __device__ __forceinline__ explicit SplitSum(int size) {
    const int steps = static_cast<int>(divide_up(size, PRODUCT_DEPTH));
    begin = static_cast<int>(int64_t(steps) * blockIdx.y / gridDim.y) * PRODUCT_DEPTH;
    end = min(size, static_cast<int>(int64_t(steps) * (blockIdx.y + 1) / gridDim.y) * PRODUCT_DEPTH);
  }
};

/// ROW_WARPS = 1: 16 rows a block, its four warps share the sum. ROW_WARPS = 4: 64 rows, 16 a warp.
template <class T, int ROW_WARPS>
struct ProductShared {
  static constexpr int ROWS = 16 * ROW_WARPS, SUM_WARPS = 4 / ROW_WARPS, STAGES = 4;
  struct Stage {
    T weight[64 * TILE_STRIDE<64>];
    T x[ROWS * TILE_STRIDE<64>];
  };
  union alignas(128) {
    Stage stages[STAGES];
    float result[SUM_WARPS][ROWS][PRODUCT_COLUMNS + 4];
  };
};

/// The end of a product of up to 16 rows, for all threads of every block. The last block of a tile of columns adds up its
/// parts and its columns' terms of every row's sum; the last of those blocks has all sums and stores all rows. Every
/// sum has its order, whoever comes last. `terms`: [rows, tiles] elements.
template <class T, class Finish>
__device__ __forceinline__ void finish_last(
    const ProductRows<T>& y, const Finish& finish, unsigned* counters, float* terms) {
  __shared__ float totals[16];
  const int tile = blockIdx.x, tiles = gridDim.x, size = y.product.size;
  if (!last_arrival(counters[tile], gridDim.y)) return;
  const int column = tile * PRODUCT_COLUMNS + threadIdx.x % 16 * 4;
  for (int first = 0; first < y.product.x.rows; first += PRODUCT_THREADS / 16) {
    const int row = first + threadIdx.x / 16;
    float term = 0;
    if (row < y.product.x.rows && column < size) {
      y.template collect<4>(row, column);
      if (row < finish.rows) term = finish.template term<4>(y, row, column);
    }
#pragma unroll
    for (int offset = 8; offset > 0; offset /= 2) term += __shfl_xor_sync(ALL_LANES, term, offset);
    if (threadIdx.x % 16 == 0 && row < finish.rows) terms[row * tiles + tile] = term;
  }

  if (!last_arrival(counters[MAX_COUNTED_TILES], tiles)) return;
  for (int row = threadIdx.x / 32; row < finish.rows; row += PRODUCT_THREADS / 32) {
    float total = 0;
    for (int t = threadIdx.x % 32; t < tiles; t += 32) total += terms[row * tiles + t];
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) totals[row] = total;
  }
  __syncthreads();
  // One block for all rows: its time is that of its loads, so many are under way before the first store, which the
  // compiler may not move them across.
  constexpr int TOGETHER = 8;
  const int width = size / 4, count = finish.rows * width;
  for (int first = threadIdx.x; first < count; first += TOGETHER * PRODUCT_THREADS) {
    typename Finish::template Loaded<4> loaded[TOGETHER];
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k)
      if (const int i = first + k * PRODUCT_THREADS; i < count)
        loaded[k] = finish.template load<4>(y, i / width, i % width * 4);
#pragma unroll
    for (int k = 0; k < TOGETHER; ++k)
      if (const int i = first + k * PRODUCT_THREADS; i < count)
        finish.template store<4>(y, i / width, i % width * 4, totals[i / width], loaded[k]);
  }
}

/// Tensor-core product of 16-bit data, accumulated in float32. `size` and all strides are multiples of 8.
/// Grid: (tiles of PRODUCT_COLUMNS, splits, row tiles). `slot`: of the counters; or -1, and another kernel finishes.
template <class T, int ROW_WARPS, class Finish>
__global__ void __launch_bounds__(PRODUCT_THREADS)
    product_kernel(const ProductArguments<T> a, const Finish finish, int slot, float* terms) {
  using Shared = ProductShared<T, ROW_WARPS>;
  constexpr bool TRANSPOSED = Finish::TRANSPOSED;
  constexpr int ROWS = Shared::ROWS, STAGES = Shared::STAGES, STRIDE = TILE_STRIDE<64>;
  DIFFMAS_SHARED(Shared, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row_warp = ROW_WARPS == 1 ? 0 : warp, sum_warp = ROW_WARPS == 1 ? warp : 0;
  const int first_row = blockIdx.z * ROWS, first_column = blockIdx.x * PRODUCT_COLUMNS;
  const SplitSum sum(a.size);
  const int steps = static_cast<int>(divide_up(sum.end - sum.begin, PRODUCT_DEPTH));

  // Rows and columns that do not exist become zero; a row is cut where the matrix ends.
  const auto copy_square = [&](auto rows, T* tile, auto source, int row_end, int begin, int end) {
    constexpr int COUNT = decltype(rows)::value;
#pragma unroll
    for (int i = threadIdx.x; i < COUNT * 8; i += PRODUCT_THREADS) {
      const int r = i / 8, c = i % 8 * 8;
      const bool exists = r < row_end && begin + c < end;
      copy_async<16>(tile + r * STRIDE + c, exists ? source(r) + begin + c : source(0), exists);
    }
  };
  const auto copy = [&](int step) {
    if (step < steps) {
      auto& stage = shared.stages[step % STAGES];
      const int k = sum.begin + step * PRODUCT_DEPTH;
      copy_square(
          std::integral_constant<int, ROWS>(), stage.x, [&](int r) { return a.x.at(first_row + r); },
          a.x.rows - first_row, k, sum.end);
      const int row = TRANSPOSED ? first_column : k, column = TRANSPOSED ? k : first_column;
      copy_square(
          std::integral_constant<int, 64>(), stage.weight,
          [&](int r) { return a.weight + (row + r) * a.weight_stride; }, (TRANSPOSED ? a.size : sum.end) - row, column,
          TRANSPOSED ? sum.end : a.size);
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < STAGES - 1; ++step) copy(step);

  float y[PRODUCT_COLUMNS / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    copy(step + STAGES - 1);
    const auto& stage = shared.stages[step % STAGES];
#pragma unroll
    for (int k = sum_warp * 16; k < PRODUCT_DEPTH; k += Shared::SUM_WARPS * 16) {
      const T* x = stage.x + row_warp * 16 * STRIDE + k;
      if constexpr (TRANSPOSED) {
        add_row_products<64, 16>(y, x, stage.weight + k);
      } else {
        uint32_t left[4];
        load_matrices<false>(left, x + lane % 16 * STRIDE + lane / 16 * 8);
        accumulate_rows<64, 64>(y, left, stage.weight + k * STRIDE);
      }
    }
  }

  wait_copies<0>();
  __syncthreads();  // the results below take the place of the stages
#pragma unroll
  for (int n = 0; n < PRODUCT_COLUMNS / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      shared.result[sum_warp][row_warp * 16 + lane / 4 + i / 2 * 8][n * 8 + lane % 4 * 2 + i % 2] = y[n][i];
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * PRODUCT_COLUMNS / 4; i += PRODUCT_THREADS) {
    const int r = i / (PRODUCT_COLUMNS / 4), c = i % (PRODUCT_COLUMNS / 4) * 4;
    if (first_row + r >= a.x.rows || first_column + c >= a.size) continue;
    Vector<float, 4> total{};
#pragma unroll
    for (int w = 0; w < Shared::SUM_WARPS; ++w)
#pragma unroll
      for (int e = 0; e < 4; ++e) total.element[e] += shared.result[w][r][c + e];
    *reinterpret_cast<Vector<float, 4>*>(a.parts + a.part(blockIdx.y, first_row + r) + first_column + c) = total;
  }
  if constexpr (ROW_WARPS == 1)
    if (slot >= 0) finish_last(ProductRows<T>{a, static_cast<int>(gridDim.y)}, finish, arrivals[slot], terms);
}

/// The same for every other type and alignment. Grid: (tiles of PRODUCT_COLUMNS, splits, tiles of SIMPLE_PRODUCT_ROWS).
constexpr int SIMPLE_PRODUCT_ROWS = 16, SIMPLE_PRODUCT_DEPTH = 16;

template <class A>
struct SimpleProductShared {
  A x[SIMPLE_PRODUCT_ROWS][SIMPLE_PRODUCT_DEPTH];
  A weight[SIMPLE_PRODUCT_DEPTH][PRODUCT_COLUMNS + 1];
};

template <class T, bool TRANSPOSED>
__global__ void __launch_bounds__(PRODUCT_THREADS) product_simple_kernel(const ProductArguments<T> a) {
  using A = Acc<T>;
  constexpr int ROWS = SIMPLE_PRODUCT_ROWS, DEPTH = SIMPLE_PRODUCT_DEPTH;
  constexpr int OWN = ROWS * PRODUCT_COLUMNS / PRODUCT_THREADS;
  DIFFMAS_SHARED(SimpleProductShared<A>, shared);
  const int first_row = blockIdx.z * ROWS, first_column = blockIdx.x * PRODUCT_COLUMNS;
  const int column = threadIdx.x % PRODUCT_COLUMNS, own_row = threadIdx.x / PRODUCT_COLUMNS * OWN;
  const SplitSum sum(a.size);
  A y[OWN] = {};
  for (int first = sum.begin; first < sum.end; first += DEPTH) {
    __syncthreads();
    for (int i = threadIdx.x; i < ROWS * DEPTH; i += PRODUCT_THREADS) {
      const int r = i / DEPTH, k = i % DEPTH;
      const bool exists = first_row + r < a.x.rows && first + k < sum.end;
      shared.x[r][k] = exists ? accurate(a.x.at(first_row + r)[first + k]) : A(0);
    }
    for (int i = threadIdx.x; i < DEPTH * PRODUCT_COLUMNS; i += PRODUCT_THREADS) {
      const int k = TRANSPOSED ? i % DEPTH : i / PRODUCT_COLUMNS, c = TRANSPOSED ? i / DEPTH : i % PRODUCT_COLUMNS;
      const int64_t row = TRANSPOSED ? first_column + c : first + k, at = TRANSPOSED ? first + k : first_column + c;
      const bool exists = first + k < sum.end && first_column + c < a.size;
      shared.weight[k][c] = exists ? accurate(a.weight[row * a.weight_stride + at]) : A(0);
    }
    __syncthreads();
    for (int k = 0; k < DEPTH; ++k)
#pragma unroll
      for (int r = 0; r < OWN; ++r) y[r] += shared.x[own_row + r][k] * shared.weight[k][column];
  }
#pragma unroll
  for (int r = 0; r < OWN; ++r)
    if (first_row + own_row + r < a.x.rows && first_column + column < a.size)
      a.parts[a.part(blockIdx.y, first_row + own_row + r) + first_column + column] = y[r];
}

/// A block has a whole row, of which there are few.
constexpr int FINISH_THREADS = 1024;

/// Sum over the block, the same in all threads.
template <class A>
__device__ __forceinline__ A block_sum(A x) {
  __shared__ A sums[FINISH_THREADS / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  A total = 0;
#pragma unroll
  for (int w = 0; w < FINISH_THREADS / 32; ++w) total += sums[w];
  return total;
}

/// Finishes the rows of a product that did not do so itself. Grid: `finish.rows`.
template <class T, class Finish>
__global__ void __launch_bounds__(FINISH_THREADS) rescale_kernel(ProductRows<T> y, Finish finish) {
  const int row = blockIdx.x, size = y.product.size;
  Acc<T> total = 0;
  for (int c = threadIdx.x; c < size; c += FINISH_THREADS) {
    for (int r = row; r < y.product.x.rows; r += finish.rows) y.template collect<1>(r, c);
    total += finish.template term<1>(y, row, c);
  }
  total = block_sum(total);
  for (int c = threadIdx.x; c < size; c += FINISH_THREADS)
    finish.template store<1>(y, row, c, total, finish.template load<1>(y, row, c));
}

constexpr int OUTER_TILE = 64, OUTER_ROWS = 16, OUTER_THREADS = 256;

template <class A>
struct OuterShared {
  A hidden[OUTER_ROWS][OUTER_TILE], grad_y[OUTER_ROWS][OUTER_TILE];
};

/// grad_weight [size, size] = hidden^T grad_y, every element written once. Grid: (size, size) in tiles of OUTER_TILE.
template <class T>
__global__ void __launch_bounds__(OUTER_THREADS)
    outer_product_kernel(StackedRows<T> hidden, const Acc<T>* grad_y, Acc<T>* grad_weight, int size) {
  using A = Acc<T>;
  DIFFMAS_SHARED(OuterShared<A>, shared);
  const int first_i = blockIdx.y * OUTER_TILE, first_j = blockIdx.x * OUTER_TILE;
  // A thread's four rows lie together; its four columns 16 apart, so that neighbours write neighbouring elements.
  const int i = threadIdx.x / 16 * 4, j = threadIdx.x % 16;
  A sum[4][4] = {};
  for (int first = 0; first < hidden.rows; first += OUTER_ROWS) {
    __syncthreads();
    for (int e = threadIdx.x; e < OUTER_ROWS * OUTER_TILE; e += OUTER_THREADS) {
      const int r = e / OUTER_TILE, c = e % OUTER_TILE;
      const bool row = first + r < hidden.rows;
      shared.hidden[r][c] = row && first_i + c < size ? accurate(hidden.at(first + r)[first_i + c]) : A(0);
      shared.grad_y[r][c] = row && first_j + c < size ? grad_y[int64_t(first + r) * size + first_j + c] : A(0);
    }
    __syncthreads();
    const int rows = min(OUTER_ROWS, hidden.rows - first);
    for (int r = 0; r < rows; ++r)
#pragma unroll
      for (int x = 0; x < 4; ++x)
#pragma unroll
        for (int y = 0; y < 4; ++y) sum[x][y] += shared.hidden[r][i + x] * shared.grad_y[r][j + y * 16];
  }
#pragma unroll
  for (int x = 0; x < 4; ++x)
#pragma unroll
    for (int y = 0; y < 4; ++y)
      if (first_i + i + x < size && first_j + j + y * 16 < size)
        grad_weight[int64_t(first_i + i + x) * size + first_j + j + y * 16] = sum[x][y];
}

}  // namespace diffmas

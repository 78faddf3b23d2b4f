// expected_embedding and its backward: attention of a few rows over a vocabulary. A block takes a part of the tokens for
// 16 rows and goes through it by tiles: products of the rows with the tile's tokens, a softmax or its gradient, and
// sums of the tokens weighted by that, which stay in registers. The parts' sums are put together by a second kernel.
#pragma once

#include <limits>

#include "diffmas/attention.cuh"
#include "diffmas/tiles.cuh"

namespace diffmas {

/// Rows and tokens of a tile, and elements of a token that are loaded together. Sixteen threads share a row of a tile,
/// four tokens each.
constexpr int VOCABULARY_ROWS = 16, VOCABULARY_TOKENS = 64, VOCABULARY_PIECE = 128, VOCABULARY_THREADS = 256;
constexpr int ROW_LANES = 16, LANE_TOKENS = 4;
/// Parts that a vocabulary is cut into at most.
constexpr int MAX_VOCABULARY_PARTS = 256;

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  int size;

  DIFFMAS_HD const T* at(int64_t row) const { return data + row * stride; }
};

/// A matrix of tokens [vocab, size] that is streamed, and the rows [rows, size] it is multiplied by.
template <class T>
struct Pass {
  Matrix<T> left, tokens;
};

/// Forward: hidden with keys, then sums of values. Backward: grad_out with values, hidden with keys, sums of keys.
/// The last pass has no left. Results of a part: sums [parts, rows, size], relative to the exponential of highest
/// [parts, rows] in the forward; total [parts, rows] is the sum of weights, or that of scores times their gradients.
template <class T, bool BACKWARD>
struct VocabularyArguments {
  static constexpr int PRODUCTS = BACKWARD ? 2 : 1;
  Pass<T> passes[PRODUCTS + 1];
  const T *bias, *out;
  const Acc<T>*temperature, *lse;
  int rows, vocab, chunk;
  Acc<T> scale;
  SoftCap<Acc<T>> softcap;
  Acc<T>*sums, *highest, *total;

  DIFFMAS_HD int size() const { return passes[PRODUCTS].tokens.size; }
};

/// What a block has to do. Grid: (tiles of rows, chunks of the sums' elements, parts).
struct VocabularyWork {
  int first_row, begin, end;

  template <class Arguments>
  __device__ __forceinline__ explicit VocabularyWork(const Arguments& a) : first_row(blockIdx.x * VOCABULARY_ROWS) {
    const int64_t tiles = divide_up(a.vocab, VOCABULARY_TOKENS);
    begin = static_cast<int>(tiles * blockIdx.z / gridDim.z) * VOCABULARY_TOKENS;
    end = static_cast<int>(min(int64_t(a.vocab), tiles * (blockIdx.z + 1) / gridDim.z * VOCABULARY_TOKENS));
  }
};

template <class A>
__device__ __forceinline__ A row_sum(A x) {
#pragma unroll
  for (int offset = ROW_LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}

template <class A>
__device__ __forceinline__ A row_max(A x) {
#pragma unroll
  for (int offset = ROW_LANES / 2; offset > 0; offset /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, offset));
  return x;
}

/// What a tile's products become: of one row, in every one of its threads.
template <class T, bool BACKWARD>
struct RowSoftmax {
  using A = Acc<T>;
  using Arguments = VocabularyArguments<T, BACKWARD>;
  A temperature, lse = 0, delta = 0, highest = -INFINITY, total = 0;
  int row, first_token;

  __device__ __forceinline__ RowSoftmax(const Arguments& a, int first_row)
      : temperature(*a.temperature),
        row(first_row + threadIdx.x / ROW_LANES),
        first_token(threadIdx.x % ROW_LANES * LANE_TOKENS) {}

  /// What the backward reads of its row; N neighbouring elements are loaded together.
  template <int N>
  __device__ __forceinline__ void read_row(const Arguments& a) {
    const Matrix<T>& grad = a.passes[0].left;
    // What a likely token's product is compared with: their difference is small beside both.
    double along = 0;
    if (row < a.rows) {
      lse = a.lse[row];
#pragma unroll 4
      for (int d = threadIdx.x % ROW_LANES * N; d < grad.size; d += ROW_LANES * N) {
        const auto g = *reinterpret_cast<const Vector<T, N>*>(grad.at(row) + d);
        const auto o = *reinterpret_cast<const Vector<T, N>*>(a.out + int64_t(row) * grad.size + d);
#pragma unroll
        for (int i = 0; i < N; ++i) along += accurate(g.element[i]) * accurate(o.element[i]);
      }
    }
    delta = static_cast<A>(row_sum(along));
  }

  __device__ __forceinline__ A logit(const Arguments& a, A product, int token) const {
    return a.softcap.score((product + (a.bias == nullptr ? A(0) : accurate(a.bias[token]))) * a.scale);
  }

  /// Weights of this thread's tokens, `products` after the tile's first token `begin`; returns what the sums so far are
  /// to be multiplied by.
  template <class Products>
  __device__ __forceinline__ A weigh(const Arguments& a, int begin, Products products, A (&weight)[LANE_TOKENS]) {
    A kept = 1;
#pragma unroll
    for (int i = 0; i < LANE_TOKENS; ++i) {
      const int token = begin + first_token + i;
      const bool known = token < a.vocab;
      const A z = known ? logit(a, products(BACKWARD, i), token) : A(0), score = z / temperature;
      if constexpr (BACKWARD) {
        const A slope = known ? exp(score - lse) * (products(0, i) - delta) : A(0);
        // A token of score minus infinity has no weight; it would make 0 · ∞ of it.
        constexpr A LOWEST = std::numeric_limits<A>::lowest();
        total += slope * max(score, LOWEST);
        weight[i] = a.softcap.gradient(z, slope) * (a.scale / temperature);
      } else {
        weight[i] = known ? score : A(-INFINITY);
      }
    }
    if constexpr (!BACKWARD) {
      A top = highest, sum = 0;
#pragma unroll
      for (int i = 0; i < LANE_TOKENS; ++i) top = max(top, weight[i]);
      top = row_max(top);
      const A base = top == A(-INFINITY) ? A(0) : top;
#pragma unroll
      for (int i = 0; i < LANE_TOKENS; ++i) sum += weight[i] = exp(weight[i] - base);
      kept = exp(highest - base);
      total = total * kept + row_sum(sum);
      highest = top;
    }
    return kept;
  }

  __device__ __forceinline__ void finish(const Arguments& a) {
    if constexpr (BACKWARD) total = row_sum(total);
    if (threadIdx.x % ROW_LANES != 0 || blockIdx.y != 0 || row >= a.rows) return;
    const int64_t at = int64_t(blockIdx.z) * a.rows + row;
    a.total[at] = total;
    if constexpr (!BACKWARD) a.highest[at] = highest;
  }
};

/// Numbers as two of 16 bits, which together carry more than twice the precision of one: x / unit = high + low. Units
/// are powers of two that keep the largest number near 2^14, where neither part of a float16 gets lost below.
constexpr float OPERAND_LIMIT = 16384;

__device__ __forceinline__ float power_below(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= 0x7f800000u;
  memcpy(&x, &bits, sizeof bits);
  return x;
}

template <class T, bool BACKWARD>
struct VocabularyShared {
  static constexpr int STAGES = BACKWARD ? 3 : 4, STRIDE = TILE_STRIDE<VOCABULARY_PIECE>;
  struct Stage {
    T tokens[VOCABULARY_TOKENS * STRIDE];
    T left[VOCABULARY_ROWS * STRIDE];
  };
  alignas(128) Stage stages[STAGES];
  /// Of the lower and the upper half of every piece.
  float products[BACKWARD ? 2 : 1][2][VOCABULARY_ROWS][VOCABULARY_TOKENS + 4];
  T high[VOCABULARY_ROWS * TILE_STRIDE<VOCABULARY_TOKENS>], low[VOCABULARY_ROWS * TILE_STRIDE<VOCABULARY_TOKENS>];
  float factor[VOCABULARY_ROWS];
};

/// The pieces of a block's tokens on their way to shared memory, in the order in which they are used.
template <class T, bool BACKWARD>
struct TokenStream {
  using Arguments = VocabularyArguments<T, BACKWARD>;
  using Shared = VocabularyShared<T, BACKWARD>;
  static constexpr int PRODUCTS = Arguments::PRODUCTS;
  const Arguments& a;
  Shared& shared;
  const VocabularyWork work;
  const int chunk_begin, chunk_end;
  int token, pass = 0, column = 0, copied = 0, used = 0;

  __device__ __forceinline__ TokenStream(const Arguments& a, Shared& shared)
      : a(a),
        shared(shared),
        work(a),
        chunk_begin(blockIdx.y * a.chunk),
        chunk_end(min(a.size(), chunk_begin + a.chunk)),
        token(work.begin) {
#pragma unroll
    for (int stage = 0; stage < Shared::STAGES - 1; ++stage) copy();
  }

  template <int ROWS>
  __device__ __forceinline__ void copy_rows(T* tile, const Matrix<T>& source, int first, int row_end, int column_end) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * VOCABULARY_PIECE / 8; i += VOCABULARY_THREADS) {
      const int r = i / (VOCABULARY_PIECE / 8), c = i % (VOCABULARY_PIECE / 8) * 8;
      const bool exists = first + r < row_end && column + c < column_end;
      copy_async<16>(tile + r * Shared::STRIDE + c, exists ? source.at(first + r) + column + c : source.data, exists);
    }
  }

  __device__ __forceinline__ void copy() {
    if (token < work.end) {
      auto& stage = shared.stages[copied % Shared::STAGES];
      const Pass<T>& source = a.passes[pass];
      const int end = pass == PRODUCTS ? chunk_end : source.tokens.size;
      copy_rows<VOCABULARY_TOKENS>(stage.tokens, source.tokens, token, work.end, end);
      if (pass < PRODUCTS) copy_rows<VOCABULARY_ROWS>(stage.left, source.left, work.first_row, a.rows, end);
      column += VOCABULARY_PIECE;
      if (column >= end) {
        if (pass++ == PRODUCTS) {
          pass = 0;
          token += VOCABULARY_TOKENS;
        }
        column = pass == PRODUCTS ? chunk_begin : 0;
      }
    }
    ++copied;
    commit_copies();
  }

  /// The next piece. All threads are past the one before, whose place takes the copy that starts now.
  __device__ __forceinline__ const typename Shared::Stage& next() {
    wait_copies<Shared::STAGES - 2>();
    __syncthreads();
    copy();
    return shared.stages[used++ % Shared::STAGES];
  }
};

/// 16-bit data on tensor cores, accumulated in float32. Sizes and strides are multiples of 8; `a.chunk`, at most WIDTH,
/// one of VOCABULARY_PIECE. Eight warps: in products, 16 tokens and half of a piece each; in sums, 16 elements of every
/// piece.
template <class T, bool BACKWARD, int WIDTH>
__global__ void __launch_bounds__(VOCABULARY_THREADS)
    vocabulary_kernel(const __grid_constant__ VocabularyArguments<T, BACKWARD> a) {
  using Shared = VocabularyShared<T, BACKWARD>;
  constexpr int PIECE = VOCABULARY_PIECE, TOKENS = VOCABULARY_TOKENS, STRIDE = Shared::STRIDE;
  constexpr int WEIGHTS = TILE_STRIDE<TOKENS>;
  DIFFMAS_SHARED(Shared, shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp % 4, half = warp / 4;
  TokenStream<T, BACKWARD> stream(a, shared);
  const VocabularyWork& work = stream.work;
  RowSoftmax<T, BACKWARD> softmax(a, work.first_row);
  if constexpr (BACKWARD) softmax.template read_row<8>(a);
  float sums[WIDTH / PIECE][2][4] = {}, unit = 1 / OPERAND_LIMIT;

  for (int token = work.begin; token < work.end; token += TOKENS) {
#pragma unroll
    for (int product = 0; product < a.PRODUCTS; ++product) {
      float s[2][4] = {};
      for (int column = 0; column < a.passes[product].tokens.size; column += PIECE) {
        const auto& stage = stream.next();
        // Pieces are added as wholes: less rounding than one long sum.
        float of_piece[2][4] = {};
        add_row_products<PIECE, PIECE / 2>(
            of_piece, stage.left + half * PIECE / 2, stage.tokens + group * 16 * STRIDE + half * PIECE / 2);
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] += of_piece[n][i];
      }
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          shared.products[product][half][lane / 4 + i / 2 * 8][group * 16 + n * 8 + lane % 4 * 2 + i % 2] = s[n][i];
    }
    __syncthreads();

    const int row = threadIdx.x / ROW_LANES, first = softmax.first_token;
    float weight[LANE_TOKENS];
    const auto product = [&](int which, int i) {
      return shared.products[which][0][row][first + i] + shared.products[which][1][row][first + i];
    };
    float kept = softmax.weigh(a, token, product, weight);
    if constexpr (BACKWARD) {
      float largest = unit * OPERAND_LIMIT;
      if (token == work.begin) largest = 0x1p-100f;
#pragma unroll
      for (int i = 0; i < LANE_TOKENS; ++i) largest = max(largest, fabsf(weight[i]));
      const float before = unit;
      unit = power_below(row_max(largest)) / OPERAND_LIMIT;
      kept = before / unit;
    }
#pragma unroll
    for (int i = 0; i < LANE_TOKENS; ++i) {
      const float x = weight[i] / unit;
      const T high = rounded<T>(x);
      shared.high[row * WEIGHTS + first + i] = high;
      shared.low[row * WEIGHTS + first + i] = rounded<T>(x - accurate(high));
    }
    if (threadIdx.x % ROW_LANES == 0) shared.factor[row] = kept;
    __syncthreads();

    uint32_t high[TOKENS / 16][4], low[TOKENS / 16][4];
    const int operand = lane % 16 * WEIGHTS + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < TOKENS / 16; ++k) {
      load_matrices<false>(high[k], shared.high + operand + k * 16);
      load_matrices<false>(low[k], shared.low + operand + k * 16);
    }
    const float upper = shared.factor[lane / 4], lower = shared.factor[lane / 4 + 8];
#pragma unroll
    for (int n = 0; n < WIDTH / PIECE; ++n) {
      if (stream.chunk_begin + n * PIECE >= stream.chunk_end) break;
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][j][i] *= i < 2 ? upper : lower;
      const T* tokens = stream.next().tokens + warp * 16;
#pragma unroll
      for (int k = 0; k < TOKENS / 16; ++k) {
        accumulate_rows<PIECE, 16>(sums[n], high[k], tokens + k * 16 * STRIDE);
        accumulate_rows<PIECE, 16>(sums[n], low[k], tokens + k * 16 * STRIDE);
      }
    }
  }

  softmax.finish(a);
  __syncthreads();  // the factors of the last tile have been read
  if (threadIdx.x % ROW_LANES == 0) shared.factor[threadIdx.x / ROW_LANES] = unit;
  __syncthreads();
#pragma unroll
  for (int n = 0; n < WIDTH / PIECE; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int row = lane / 4 + i * 4, column = stream.chunk_begin + n * PIECE + warp * 16 + j * 8 + lane % 4 * 2;
        if (work.first_row + row >= a.rows || column >= stream.chunk_end) continue;
        const float factor = shared.factor[row];
        const Vector<float, 2> pair{sums[n][j][i] * factor, sums[n][j][i + 1] * factor};
        const int64_t at = (int64_t(blockIdx.z) * a.rows + work.first_row + row) * a.size() + column;
        *reinterpret_cast<Vector<float, 2>*>(a.sums + at) = pair;
      }
}

/// The same for every other type, size and alignment, with multiply-adds; sums grow in memory, every element in a thread
/// of its own.
template <class A, bool BACKWARD>
struct SimpleVocabularyShared {
  A products[BACKWARD ? 2 : 1][VOCABULARY_ROWS][VOCABULARY_TOKENS + 1];
  A weights[VOCABULARY_TOKENS][VOCABULARY_ROWS];
  A factor[VOCABULARY_ROWS];
};

template <class T, bool BACKWARD>
__global__ void __launch_bounds__(VOCABULARY_THREADS)
    vocabulary_simple_kernel(const __grid_constant__ VocabularyArguments<T, BACKWARD> a) {
  using A = Acc<T>;
  using Shared = SimpleVocabularyShared<A, BACKWARD>;
  constexpr int ROWS = VOCABULARY_ROWS, TOKENS = VOCABULARY_TOKENS, TOGETHER = 4;
  DIFFMAS_SHARED(Shared, shared);
  const VocabularyWork work(a);
  RowSoftmax<T, BACKWARD> softmax(a, work.first_row);
  if constexpr (BACKWARD) softmax.template read_row<1>(a);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = min(ROWS, a.rows - work.first_row);

  for (int token = work.begin; token < work.end; token += TOKENS) {
    const int count = min(TOKENS, work.end - token);
    __syncthreads();
    for (int product = 0; product < a.PRODUCTS; ++product) {
      const Pass<T>& pass = a.passes[product];
      for (int t = warp * TOGETHER; t < count; t += VOCABULARY_THREADS / 32 * TOGETHER) {
        A s[ROWS][TOGETHER] = {};
        for (int d = lane; d < pass.tokens.size; d += 32) {
          A x[TOGETHER];
#pragma unroll
          for (int i = 0; i < TOGETHER; ++i) x[i] = t + i < count ? accurate(pass.tokens.at(token + t + i)[d]) : A(0);
#pragma unroll
          for (int r = 0; r < ROWS; ++r) {
            const A left = r < rows ? accurate(pass.left.at(work.first_row + r)[d]) : A(0);
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) s[r][i] += left * x[i];
          }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          if (r >= rows) break;
#pragma unroll
          for (int i = 0; i < TOGETHER; ++i) {
            const A sum = warp_sum(s[r][i]);
            if (lane == 0) shared.products[product][r][t + i] = sum;
          }
        }
      }
    }
    __syncthreads();
    const int row = threadIdx.x / ROW_LANES;
    A weight[LANE_TOKENS];
    const auto product = [&](int which, int i) { return shared.products[which][row][softmax.first_token + i]; };
    const A kept = softmax.weigh(a, token, product, weight);
#pragma unroll
    for (int i = 0; i < LANE_TOKENS; ++i) shared.weights[softmax.first_token + i][row] = weight[i];
    if (threadIdx.x % ROW_LANES == 0) shared.factor[row] = token == work.begin ? A(0) : kept;
    __syncthreads();

    const Matrix<T>& tokens = a.passes[a.PRODUCTS].tokens;
    for (int d = threadIdx.x; d < a.size(); d += VOCABULARY_THREADS) {
      A sums[ROWS] = {};
      A* const target = a.sums + (int64_t(blockIdx.z) * a.rows + work.first_row) * a.size() + d;
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (r < rows && token > work.begin) sums[r] = target[int64_t(r) * a.size()] * shared.factor[r];
      for (int t = 0; t < count; ++t) {
        const A x = accurate(tokens.at(token + t)[d]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[r] += shared.weights[t][r] * x;
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (r < rows) target[int64_t(r) * a.size()] = sums[r];
    }
  }
  softmax.finish(a);
}

/// Puts the parts together, in their order: the softmax's sums and its log-sum-exp. Grid: (tiles of VOCABULARY_THREADS
/// elements, rows).
template <class T>
__global__ void __launch_bounds__(VOCABULARY_THREADS) combine_vocabulary_kernel(
    const Acc<T>* sums, const Acc<T>* highest, const Acc<T>* total, T* out, Acc<T>* lse, int rows, int parts,
    int size) {
  using A = Acc<T>;
  __shared__ A weights[MAX_VOCABULARY_PARTS], totals[MAX_VOCABULARY_PARTS];
  const int row = blockIdx.y, lane = threadIdx.x % 32, d = blockIdx.x * VOCABULARY_THREADS + threadIdx.x;
  for (int p = threadIdx.x; p < parts; p += VOCABULARY_THREADS) weights[p] = highest[int64_t(p) * rows + row];
  __syncthreads();
  A top = -INFINITY, sum = 0;
  for (int p = lane; p < parts; p += 32) top = max(top, weights[p]);
  top = warp_max(top);
  __syncthreads();
  for (int p = threadIdx.x; p < parts; p += VOCABULARY_THREADS) {
    // All of them are those of nothing where every token's score is minus infinity.
    weights[p] = exp(weights[p] - top);
    totals[p] = weights[p] * total[int64_t(p) * rows + row];
  }
  __syncthreads();
  for (int p = lane; p < parts; p += 32) sum += totals[p];
  sum = warp_sum(sum);
  if (d == 0) lse[row] = top + log(sum);
  if (d >= size) return;
  A x = 0;
#pragma unroll 8
  for (int p = 0; p < parts; ++p) x += weights[p] * sums[(int64_t(p) * rows + row) * size + d];
  out[int64_t(row) * size + d] = rounded<T>(x / sum);
}

/// The same for the gradients; the first block adds up the temperature's too.
template <class T>
__global__ void __launch_bounds__(VOCABULARY_THREADS) combine_gradients_kernel(
    const Acc<T>* sums, const Acc<T>* total, const Acc<T>* temperature, T* grad_hidden, Acc<T>* grad_temperature,
    int rows, int parts, int size) {
  using A = Acc<T>;
  __shared__ A warps[VOCABULARY_THREADS / 32];
  const int row = blockIdx.y, d = blockIdx.x * VOCABULARY_THREADS + threadIdx.x;
  if (row < rows && d < size) {
    A x = 0;
#pragma unroll 8
    for (int p = 0; p < parts; ++p) x += sums[(int64_t(p) * rows + row) * size + d];
    grad_hidden[int64_t(row) * size + d] = rounded<T>(x);
  }
  if (blockIdx.x != 0 || row != 0) return;
  A sum = 0;
  for (int64_t i = threadIdx.x; i < int64_t(parts) * rows; i += VOCABULARY_THREADS) sum += total[i];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  A all = 0;
  for (int w = 0; w < VOCABULARY_THREADS / 32; ++w) all += warps[w];
  *grad_temperature = -all / *temperature;
}

}  // namespace diffmas

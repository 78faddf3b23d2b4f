// Attention over a vocabulary with few query rows: keys and values leave memory once, an online softmax in between.
#include <limits>

#include "cpu/kernels/attention.h"

namespace diffmas {
namespace DIFFMAS_ISA {

namespace {

/// A row's logits in place of its products with `count` keys; what is beyond them, up to whole vectors, is undefined.
template <class S, class Cap>
inline void make_logits(const Vocabulary<S>& p, const Cap& cap, Acc<S>* products, const Acc<S>* bias, int64_t count) {
  using T = Acc<S>;
  for (int64_t i = 0; i < count; i += W<T>) {
    Vec<T> product = load(products + i);
    if (bias != nullptr) product += load(bias + i);
    store(products + i, cap.score(product * p.scale));
  }
}

/// Biases of the block in the accumulation type, or null.
template <class S>
inline const Acc<S>* block_bias(const Vocabulary<S>& p, int64_t begin, int64_t count, Acc<S>* target) {
  if (p.bias == nullptr) return nullptr;
  read_row(target, p.bias + begin, count);
  return target;
}

}  // namespace

/// The softmax of all rows over the tokens [begin, end), its sums not yet divided.
template <class S>
void expected_embedding(const ExpectedEmbedding<S>& p, int64_t begin, int64_t end, Acc<S>* scratch) {
  using T = Acc<S>;
  const int64_t depth = padded<T>(p.depth), width = padded<T>(p.width);
  Pieces<T> pieces(scratch);
  T* tile = pieces.take(STEP * larger(depth, width));
  T* weights = pieces.take(p.rows * STEP);
  T* bias = pieces.take(STEP);
  fill(p.highest, p.rows, -infinity<T>());
  fill(p.total, p.rows, T(0));
  fill(p.out, p.rows * p.out_stride, T(0));
  with_cap(p.softcap, [&](const auto& cap) {
    for (int64_t at = begin; at < end; at += STEP) {
      const int64_t count = smaller(STEP, end - at), whole = padded<T>(count);
      in_vectors(p.keys.row(at), p.keys.stride, count, p.depth, tile, [&](const auto* keys, int64_t stride) {
        dots(p.rows, count, weights, STEP, p.x.data, p.x.stride, keys, stride, depth);
      });
      const T* biases = block_bias(p, at, count, bias);
      for (int64_t row = 0; row < p.rows; ++row) {
        T* scores = weights + row * STEP;
        make_logits(p, cap, scores, biases, count);
        for (int64_t i = count; i < whole; ++i) scores[i] = -infinity<T>();
        Vec<T> most = splat(p.highest[row]);
        for (int64_t i = 0; i < whole; i += W<T>) {
          const Vec<T> score = load(scores + i) / p.temperature;
          store(scores + i, score);
          most = maximum<T>(most, score);
        }
        const T top = largest<T>(most);
        // A block in which all scores are minus infinity weighs nothing.
        const T base = top == -infinity<T>() ? T(0) : top;
        Vec<T> sums{};
        for (int64_t i = 0; i < whole; i += W<T>) {
          const Vec<T> weight = exponential(load(scores + i) - base);
          store(scores + i, weight);
          sums += weight;
        }
        if (top > p.highest[row]) {
          const T kept = exponential_scalar(p.highest[row] - top);
          p.total[row] *= kept;
          T* out = p.out + row * p.out_stride;
          for (int64_t d = 0; d < width; d += W<T>) store(out + d, load(out + d) * kept);
        }
        p.highest[row] = top;
        p.total[row] += sum<T>(sums);
      }
      in_vectors(p.values.row(at), p.values.stride, count, p.width, tile, [&](const auto* values, int64_t stride) {
        product<Into::Add, Left::RowMajor>(p.rows, width, p.out, p.out_stride, weights, STEP, values, stride, count);
      });
    }
  });
}

/// What the tokens [begin, end) owe to the rows' gradients and to the temperature's.
template <class S>
void expected_embedding_gradient(const ExpectedEmbeddingGradient<S>& p, int64_t begin, int64_t end, Acc<S>* scratch) {
  using T = Acc<S>;
  const int64_t depth = padded<T>(p.depth), width = padded<T>(p.width);
  Pieces<T> pieces(scratch);
  T* tile = pieces.take(STEP * larger(depth, width));
  T* logits = pieces.take(p.rows * STEP);
  T* grads = pieces.take(p.rows * STEP);
  T* bias = pieces.take(STEP);
  fill(p.grad_x, p.rows * p.grad_stride, T(0));
  fill(p.grad_scores, p.rows, T(0));
  const T slope = p.scale / p.temperature;
  with_cap(p.softcap, [&](const auto& cap) {
    for (int64_t at = begin; at < end; at += STEP) {
      const int64_t count = smaller(STEP, end - at), whole = padded<T>(count);
      in_vectors(p.values.row(at), p.values.stride, count, p.width, tile, [&](const auto* values, int64_t stride) {
        dots(p.rows, count, grads, STEP, p.grad_out.data, p.grad_out.stride, values, stride, width);
      });
      const T* biases = block_bias(p, at, count, bias);
      in_vectors(p.keys.row(at), p.keys.stride, count, p.depth, tile, [&](const auto* keys, int64_t stride) {
        dots(p.rows, count, logits, STEP, p.x.data, p.x.stride, keys, stride, depth);
        for (int64_t row = 0; row < p.rows; ++row) {
          T *z = logits + row * STEP, *grad = grads + row * STEP;
          make_logits(p, cap, z, biases, count);
          // Gradients of tokens that are not there are zero, their logits finite.
          for (int64_t i = count; i < whole; ++i) z[i] = 0, grad[i] = p.delta[row];
          Vec<T> together{};
          for (int64_t i = 0; i < whole; i += W<T>) {
            const Vec<T> logit = load(z + i), score = logit / p.temperature;
            const Vec<T> of_score = exponential(score - p.lse[row]) * (load(grad + i) - p.delta[row]);
            // A token of score minus infinity has no weight; it would make 0 · ∞ of it.
            together += of_score * maximum<T>(score, Vec<T>{} + std::numeric_limits<T>::lowest());
            store(grad + i, cap.gradient(logit, of_score) * slope);
          }
          p.grad_scores[row] += sum<T>(together);
        }
        product<Into::Add, Left::RowMajor>(p.rows, depth, p.grad_x, p.grad_stride, grads, STEP, keys, stride, count);
      });
    }
  });
}

#define INSTANTIATE(S)                                                                         \
  template void expected_embedding<S>(const ExpectedEmbedding<S>&, int64_t, int64_t, Acc<S>*); \
  template void expected_embedding_gradient<S>(const ExpectedEmbeddingGradient<S>&, int64_t, int64_t, Acc<S>*);
DIFFMAS_FOR_STORAGE_TYPES(INSTANTIATE)

}  // namespace DIFFMAS_ISA
}  // namespace diffmas

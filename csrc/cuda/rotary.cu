#include "diffmas/rotary.cuh"

#include "cuda/launch.h"

namespace diffmas {

namespace {

/// Calls run(T, C, N) for the types of `x` and `cos`, and the elements of a vector: N > 1 where heads fall into pairs
/// of vectors that turn with each other, all aligned.
template <class F>
void with_vectors(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t alignment, F run) {
  with_storage_type("q", x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    constexpr int N = 16 / sizeof(T);
    const int64_t half = cos.size(1);
    const bool aligned = alignment == 16 && (half == 0 || common_alignment({&cos, &sin}) == 16) &&
        x.size(2) % (2 * N) == 0 && half % N == 0;
    const auto with_turns = [&](auto turn) {
      using C = decltype(turn);
      aligned ? run(T{}, C{}, std::integral_constant<int, N>()) : run(T{}, C{}, std::integral_constant<int, 1>());
    };
    cos.scalar_type() == x.scalar_type() ? with_turns(T{}) : with_turns(Acc<T>{});
  });
}

template <class C>
Turns<C> turns(const Tensor& cos, const Tensor& sin, bool interleaved) {
  return {
      static_cast<const C*>(cos.data_ptr()), static_cast<const C*>(sin.data_ptr()), cos.stride(0), sin.stride(0),
      static_cast<int>(cos.size(1)), interleaved};
}

dim3 rotary_grid(int64_t tokens, int64_t heads, int pairs) {
  return dim3(tokens, divide_up(heads * pairs, ROTARY_THREADS));
}

/// Vectors of N that cover half a head.
int pairs_of(int64_t dim, int n) { return static_cast<int>(divide_up(dim, 2 * n)); }

}  // namespace

Tensor rotary_append(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin, bool interleaved,
    const Tensor& keys, const Tensor& values, const Tensor& q_begin, const Tensor& q_end, const Tensor& starts,
    int64_t max_new) {
  check_rotary_append(q, k, v, cos, sin, keys, values, q_begin, q_end, starts, max_new);
  const int64_t tokens = q.size(0), heads = q.size(1), kv_heads = keys.size(1), dim = q.size(2);
  const Tensor out = new_tensor(q, {tokens, heads, dim}, q.scalar_type());
  if (tokens * (heads + kv_heads) * dim == 0) return out;
  const LaunchScope scope(keys);
  const int64_t alignment = common_alignment({&q, &k, &v, &out, &keys, &values});
  with_vectors(q, cos, sin, alignment, [&](auto element, auto turn, auto vector) {
    using T = decltype(element);
    using C = decltype(turn);
    constexpr int N = decltype(vector)::value;
    const int pairs = pairs_of(dim, N);
    scope.launch(
        "rotary_append", rotary_append_kernel<T, C, N>, rotary_grid(tokens, heads + 2 * kv_heads, pairs),
        ROTARY_THREADS, 0, packed<const T>(q), packed<const T>(k), packed<const T>(v), packed<T>(out), trace<T>(keys),
        trace<T>(values), turns<C>(cos, sin, interleaved), row_ranges(q_begin, q_end, starts),
        static_cast<int>(keys.size(0)), static_cast<int>(heads), static_cast<int>(kv_heads), static_cast<int>(dim),
        pairs);
  });
  return out;
}

std::tuple<Tensor, Tensor> rotary_backward(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  check_rotary_backward(grad_q, grad_k, cos, sin);
  const int64_t tokens = grad_q.size(0), heads = grad_q.size(1), kv_heads = grad_k.size(1), dim = grad_q.size(2);
  const Tensor to_q = new_tensor(grad_q, {tokens, heads, dim}, grad_q.scalar_type());
  const Tensor to_k = new_tensor(grad_q, {tokens, kv_heads, dim}, grad_q.scalar_type());
  if (tokens * (heads + kv_heads) * dim == 0) return {to_q, to_k};
  const LaunchScope scope(grad_q);
  const int64_t alignment = common_alignment({&grad_q, &grad_k, &to_q, &to_k});
  with_vectors(grad_q, cos, sin, alignment, [&](auto element, auto turn, auto vector) {
    using T = decltype(element);
    using C = decltype(turn);
    constexpr int N = decltype(vector)::value;
    const int pairs = pairs_of(dim, N);
    scope.launch(
        "rotary_backward", rotary_backward_kernel<T, C, N>, rotary_grid(tokens, heads + kv_heads, pairs),
        ROTARY_THREADS, 0, packed<const T>(grad_q), packed<const T>(grad_k), packed<T>(to_q), packed<T>(to_k),
        turns<C>(cos, sin, interleaved), static_cast<int>(heads), static_cast<int>(kv_heads), static_cast<int>(dim),
        pairs);
  });
  return {to_q, to_k};
}

}  // namespace diffmas

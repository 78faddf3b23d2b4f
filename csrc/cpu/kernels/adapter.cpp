// Low-rank adapters of few rows: every element of A and B is read once, and their gradients are written once.
#include "cpu/kernels/attention.h"

namespace diffmas {
namespace DIFFMAS_ISA {

namespace {

/// Calls f with the rank as a constant where it is a usual one, otherwise with 0.
template <class F>
inline void with_rank(int64_t rank, const F& f) {
  switch (rank) {
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 64:
      return f(std::integral_constant<int, 64>{});
    default:
      return f(std::integral_constant<int, 0>{});
  }
}

template <class T>
using Folded = typename Quarter<T>::type;

/// The products of x[0 .. count) and y[0 .. count), folded; `count` < W is COUNT where that is not 0. y is readable as
/// a whole vector.
template <int COUNT, class T>
inline Folded<T> products(const T* x, const T* y, int64_t count) {
  constexpr int BYTES = COUNT * sizeof(T);
  if constexpr (BYTES == 16 || BYTES == 32) {
    Folded<T> a[BYTES / 16], b[BYTES / 16];
    __builtin_memcpy(a, x, BYTES);
    __builtin_memcpy(b, y, BYTES);
    for (int i = 1; i < BYTES / 16; ++i) a[0] = a[0] * b[0] + a[i] * b[i];
    return BYTES == 16 ? a[0] * b[0] : a[0];
  } else {
    return fold<T>(load_partial(x, count) * load(y));
  }
}

template <int RANK, class T>
void adapter(const FewRowsAdapter<T>& p, T* low) {
  const int64_t rank = RANK == 0 ? p.rank : RANK, whole = rank / W<T> * W<T>, rest = rank - whole;
  const auto folded = [&](int64_t j) {
    const T* b = p.b.row(j);
    Vec<T> sum{};
    for (int64_t k = 0; k < whole; k += W<T>) sum += load(b + k) * load(low + k);
    Folded<T> result = whole > 0 ? fold<T>(sum) : Folded<T>{};
    if (rest > 0) result += products<RANK % W<T>>(b + whole, low + whole, rest);
    return result;
  };
  for (int64_t n = 0; n < p.rows; ++n) {
    read_row(low, p.low.row(n), rank, p.scaling);
    T* y = p.y.row(n);
    int64_t j = 0;
    const Folded<T> none{};
    for (; j + 4 <= p.out; j += 4) sums(folded(j), folded(j + 1), folded(j + 2), folded(j + 3), y + j);
    for (; j < p.out; ++j) {
      T last[4];
      sums(folded(j), none, none, none, last);
      y[j] = last[0];
    }
    if (p.bias == nullptr) continue;
    for (j = 0; j < p.out; ++j) y[j] += p.bias[j];
  }
}

template <int RANK, class T>
void adapter_gradient(const FewRowsAdapter<T>& p, T* scratch) {
  // Sums side by side, since each addition waits for the one before.
  constexpr int64_t chains = 4;
  const int64_t rank = RANK == 0 ? p.rank : RANK;
  T fixed[RANK == 0 ? 1 : chains * RANK];
  T* sums = RANK == 0 ? scratch : fixed;
  for (int64_t n = 0; n < p.rows; ++n) {
    const T *low = p.low.row(n), *grad = p.grad.row(n);
    fill(sums, chains * rank, T(0));
    const auto step = [&](int64_t j, T* sum) {
      const T *b = p.b.row(j), owed = grad[j], scaled = owed * p.scaling;
      T* grad_b = p.grad_b.row(j);
      for (int64_t k = 0; k < rank; ++k) {
        sum[k] += owed * b[k];
        grad_b[k] = n == 0 ? scaled * low[k] : grad_b[k] + scaled * low[k];
      }
    };
    int64_t j = 0;
    for (; j + chains <= p.out; j += chains)
      for (int64_t i = 0; i < chains; ++i) step(j + i, sums + i * rank);
    for (; j < p.out; ++j) step(j, sums);
    T* grad_low = p.grad_low.row(n);
    for (int64_t k = 0; k < rank; ++k) {
      T total = 0;
      for (int64_t i = 0; i < chains; ++i) total += sums[i * rank + k];
      grad_low[k] = total * p.scaling;
    }
  }
}

}  // namespace

/// `scratch`: padded(rank).
template <class T>
void few_rows_adapter(const FewRowsAdapter<T>& p, T* scratch) {
  with_rank(p.rank, [&](auto rank) { adapter<rank.value>(p, scratch); });
}

/// `scratch`: 4 rank.
template <class T>
void few_rows_adapter_gradient(const FewRowsAdapter<T>& p, T* scratch) {
  with_rank(p.rank, [&](auto rank) { adapter_gradient<rank.value>(p, scratch); });
}

template <class T>
void few_rows_outer(const FewRowsOuter<T>& p) {
  for (int64_t i = 0; i < p.height; ++i) {
    T* target = p.target.row(i);
    for (int64_t n = 0; n < p.rows; ++n) {
      const T factor = p.scaling * p.x.row(n)[i];
      const T* y = p.y.row(n);
      if (n == 0)
        for (int64_t j = 0; j < p.width; ++j) target[j] = factor * y[j];
      else
        for (int64_t j = 0; j < p.width; ++j) target[j] += factor * y[j];
    }
  }
}

#define INSTANTIATE(T)                                                      \
  template void few_rows_adapter<T>(const FewRowsAdapter<T>&, T*);          \
  template void few_rows_adapter_gradient<T>(const FewRowsAdapter<T>&, T*); \
  template void few_rows_outer<T>(const FewRowsOuter<T>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace DIFFMAS_ISA
}  // namespace diffmas

// The parts of a decoder layer between its products: norms, rotation of heads, gated activation.
#include "cpu/kernels/attention.h"

namespace diffmas {
namespace DIFFMAS_ISA {

namespace {

template <class T>
inline Vec<T> load_some(const T* p, int64_t count) {
  return count == W<T> ? load(p) : load_partial(p, count);
}

template <class T>
inline void store_some(T* p, Vec<T> v, int64_t count) {
  count == W<T> ? store(p, v) : store_partial(p, v, count);
}

/// f(first, count) for the vectors of 0 .. size, the last one perhaps not full.
template <class T, class F>
inline void in_lanes(int64_t size, const F& f) {
  int64_t d = 0;
  for (; d + W<T> <= size; d += W<T>) f(d, W<T>);
  if (d < size) f(d, size - d);
}

template <class T>
inline T inverse_norm(const RmsScale<T>& p, const T* x) {
  Vec<T> squares{};
  in_lanes<T>(p.dim, [&](int64_t d, int64_t count) {
    const Vec<T> v = load_some(x + d, count);
    squares += v * v;
  });
  return T(1) / T(__builtin_sqrt(sum<T>(squares) / T(p.dim) + p.epsilon));
}

template <class T>
inline Vec<T> weight_at(const RmsScale<T>& p, int64_t d, int64_t count) {
  return load_some(p.weight + d, count) + p.offset;
}

/// target = x inverse weight, for `size` numbers of which the first is the norm's number `first`.
template <class T>
inline void normalise(T* target, const RmsScale<T>& p, const T* x, T inverse, int64_t first, int64_t size) {
  in_lanes<T>(size, [&](int64_t d, int64_t count) {
    store_some(target + d, load_some(x + d, count) * inverse * weight_at(p, first + d, count), count);
  });
}

/// target = (g - u mean(g u)) inverse + residual, with u = x inverse and g = grad weight.
template <class T>
inline void norm_gradient(T* target, const RmsScale<T>& p, const T* grad, const T* x, T inverse, const T* residual) {
  Vec<T> products{};
  in_lanes<T>(p.dim, [&](int64_t d, int64_t count) {
    products += load_some(grad + d, count) * weight_at(p, d, count) * load_some(x + d, count);
  });
  const T mean = sum<T>(products) * inverse * inverse / T(p.dim);
  in_lanes<T>(p.dim, [&](int64_t d, int64_t count) {
    Vec<T> g = load_some(grad + d, count) * weight_at(p, d, count);
    g = (g - load_some(x + d, count) * mean) * inverse;
    store_some(target + d, residual == nullptr ? g : g + load_some(residual + d, count), count);
  });
}

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (exponential(-x) + T(1));
}

/// The gate's square, as far as it makes a difference: the sigmoid is 0 or 1 long before, and nothing overflows.
template <class T>
inline Vec<T> square(Vec<T> gate) {
  const Vec<T> product = gate * gate;
  return product < T(1e8) ? product : splat(T(1e8));
}

}  // namespace

template <class T>
void rms_norm(const RmsNorm<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* x = p.x.row(i);
    p.inverse[i] = inverse_norm(p.scale, x);
    normalise(p.y.row(i), p.scale, x, p.inverse[i], 0, p.scale.dim);
  }
}

template <class T>
void rms_norm_gradient(const RmsNorm<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    norm_gradient(
        p.y.row(i), p.scale, p.grad.row(i), p.x.row(i),
        p.inverse == nullptr ? inverse_norm(p.scale, p.x.row(i)) : p.inverse[i],
        p.residual.data == nullptr ? nullptr : p.residual.row(i));
}

template <class T>
void rotate_heads(const RotateHeads<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t half = p.dim / 2, together = p.scale.dim / p.dim;
  const bool normalised = p.scale.weight != nullptr;
  for (int64_t token = begin; token < end; ++token) {
    const T *cos = p.cos.row(token), *sin = p.sin.row(token);
    for (int64_t first = 0; first < p.heads; first += together) {
      const T inverse = normalised ? inverse_norm(p.scale, p.x.at(token, first)) : T(1);
      for (int64_t i = 0; i < together; ++i) {
        const T* x = p.x.at(token, first + i);
        T* y = p.y.at(token, first + i);
        if (normalised) {
          normalise(scratch, p.scale, x, inverse, i * p.dim, p.dim);
          x = scratch;
        }
        in_lanes<T>(half, [&](int64_t d, int64_t count) {
          const Vec<T> a = load_some(x + d, count), b = load_some(x + half + d, count);
          store_some(y + d, a * load_some(cos + d, count) - b * load_some(sin + d, count), count);
          store_some(y + half + d, b * load_some(cos + half + d, count) + a * load_some(sin + half + d, count), count);
        });
      }
    }
  }
}

/// `scratch` holds as many heads as are normalised together.
template <class T>
void rotate_heads_gradient(const RotateHeads<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t half = p.dim / 2, together = p.scale.dim / p.dim;
  const bool normalised = p.scale.weight != nullptr;
  for (int64_t token = begin; token < end; ++token) {
    const T *cos = p.cos.row(token), *sin = p.sin.row(token);
    for (int64_t first = 0; first < p.heads; first += together) {
      for (int64_t i = 0; i < together; ++i) {
        const T* grad = p.grad.at(token, first + i);
        T* target = normalised ? scratch + i * p.dim : p.y.at(token, first + i);
        in_lanes<T>(half, [&](int64_t d, int64_t count) {
          const Vec<T> a = load_some(grad + d, count), b = load_some(grad + half + d, count);
          store_some(target + d, a * load_some(cos + d, count) + b * load_some(sin + half + d, count), count);
          store_some(target + half + d, b * load_some(cos + half + d, count) - a * load_some(sin + d, count), count);
        });
      }
      if (!normalised) continue;
      const T* x = p.x.at(token, first);
      norm_gradient<T>(p.y.at(token, first), p.scale, scratch, x, inverse_norm(p.scale, x), nullptr);
    }
  }
}

template <class T>
void gated_unit(const GatedUnit<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    in_lanes<T>(p.dim, [&](int64_t d, int64_t count) {
      const Vec<T> gate = load_some(p.gate.row(i) + d, count);
      const Vec<T> s = sigmoid<T>(gate * (square<T>(gate) * p.cubic + p.slope));
      store_some(p.y.row(i) + d, gate * s * load_some(p.up.row(i) + d, count), count);
    });
}

template <class T>
void gated_unit_gradient(const GatedUnit<T>& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    in_lanes<T>(p.dim, [&](int64_t d, int64_t count) {
      const Vec<T> gate = load_some(p.gate.row(i) + d, count), up = load_some(p.up.row(i) + d, count);
      const Vec<T> grad = load_some(p.grad.row(i) + d, count), cubic = square<T>(gate) * p.cubic;
      const Vec<T> s = sigmoid<T>(gate * (cubic + p.slope)), rise = gate * (cubic * T(3) + p.slope);
      store_some(p.grad_up.row(i) + d, grad * gate * s, count);
      store_some(p.grad_gate.row(i) + d, grad * up * s * (rise * (T(1) - s) + T(1)), count);
    });
}

/// The rows [begin, end) of y. `scratch` holds [rank, padded(columns)] once b is transposed or its rows are cut.
template <class T>
void add_low_rank(const LowRank<T>& p, int64_t begin, int64_t end, T* scratch) {
  const int64_t width = padded<T>(p.columns), whole = p.columns / W<T> * W<T>;
  Matrix<const T> b = p.b;
  if (p.transposed || whole < p.columns) {
    for (int64_t k = 0; k < p.rank; ++k)
      for (int64_t j = 0; j < p.columns; ++j) scratch[k * width + j] = p.transposed ? p.b.row(j)[k] : p.b.row(k)[j];
    b = {scratch, width};
  }
  for (int64_t n = begin; n < end; ++n) {
    T* y = p.y.row(n);
    const T* x = p.x.row(n);
    in_lanes<T>(p.columns, [&](int64_t d, int64_t count) {
      Vec<T> total = load_some(y + d, count), product{};
      for (int64_t k = 0; k < p.rank; ++k) product += load_some(b.row(k) + d, count) * x[k];
      total += product * p.scaling;
      if (p.bias != nullptr) total += load_some(p.bias + d, count);
      store_some(y + d, total, count);
    });
  }
}

#define INSTANTIATE(T)                                                                 \
  template void rms_norm<T>(const RmsNorm<T>&, int64_t, int64_t);                      \
  template void rms_norm_gradient<T>(const RmsNorm<T>&, int64_t, int64_t);             \
  template void rotate_heads<T>(const RotateHeads<T>&, int64_t, int64_t, T*);          \
  template void rotate_heads_gradient<T>(const RotateHeads<T>&, int64_t, int64_t, T*); \
  template void gated_unit<T>(const GatedUnit<T>&, int64_t, int64_t);                  \
  template void gated_unit_gradient<T>(const GatedUnit<T>&, int64_t, int64_t);         \
  template void add_low_rank<T>(const LowRank<T>&, int64_t, int64_t, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace DIFFMAS_ISA
}  // namespace diffmas

// A decoder layer in one operator forward and two backward, with the attention's own backward between them. The CPU has
// it; on other devices the model's own modules serve. Meaning: diffmas_ops/decoder_layer/reference.py.
#include <torch/csrc/stable/library.h>

#include "cpu/linears.h"

namespace diffmas {

namespace {

using Tensors = std::vector<Tensor>;

enum Projection_ { Q, K, V, O, GATE, UP, DOWN, PROJECTIONS };
/// Before attention and MLP, of queries and keys; and perhaps behind attention and MLP.
enum Norm_ { INPUT, MIDDLE, Q_NORM, K_NORM, ATTENDED, FED, NORMS };

/// What layers differ in beside their weights; as diffmas_ops/layer.py.
struct Parts {
  double norm_offset = 0, slope = 1, cubic = 0, residual_scale = 1;
};

template <class T>
struct Layer {
  Tensors norms;
  T epsilon;
  Parts parts;
  std::vector<Linear<T>> linears;

  bool has(size_t norm) const { return norm < norms.size() && norms[norm].numel() != 0; }

  std::vector<Linear<T>> of(std::initializer_list<int> chosen) const {
    std::vector<Linear<T>> result;
    for (int i : chosen) result.push_back(linears[i]);
    return result;
  }
};

template <class T>
Layer<T> make_layer(
    const Tensor& like, const Tensor& cos, const Tensors& norms, double epsilon, const Tensors& weights,
    const Tensors& biases, const Tensors& a, const Tensors& b, const std::vector<double>& scalings,
    const std::vector<double>& parts) {
  const ScalarType dtype = like.scalar_type();
  STD_TORCH_CHECK(
      norms.size() == ATTENDED || norms.size() == NORMS, "there are ", norms.size(),
      " norms; allowed: 4, or 6 with those behind attention and MLP");
  const Tensors* lists[] = {&weights, &a, &b};
  const char* names[] = {"weights", "a", "b"};
  for (int i = 0; i < 3; ++i)
    STD_TORCH_CHECK(lists[i]->size() == PROJECTIONS, "there are ", lists[i]->size(), " ", names[i], "; allowed: 7");
  STD_TORCH_CHECK(
      biases.empty() || biases.size() == PROJECTIONS, "there are ", biases.size(), " biases; allowed: 7, or none");
  STD_TORCH_CHECK(scalings.size() == PROJECTIONS, "there are ", scalings.size(), " scalings; allowed: 7");
  STD_TORCH_CHECK(parts.empty() || parts.size() == 4, "there are ", parts.size(), " parts; allowed: 4, or none");
  STD_TORCH_CHECK(epsilon >= 0, "epsilon is ", epsilon, "; allowed: 0 and above");
  for (int i = 0; i < PROJECTIONS; ++i) check_dim({"weights", i}, weights[i], 2);
  check_dim("cos", cos, 2);
  const int64_t hidden = weights[O].size(0), queries = weights[Q].size(0), kv = weights[K].size(0), dim = cos.size(1);
  STD_TORCH_CHECK(
      dim > 0 && dim % 2 == 0 && queries % dim == 0 && kv % dim == 0, "cos has head dim ", dim,
      "; allowed: even divisors of ", queries, " and ", kv);
  Layer<T> layer{norms, static_cast<T>(epsilon), {}, {}};
  if (!parts.empty()) layer.parts = {parts[0], parts[1], parts[2], parts[3]};
  const int64_t widths[] = {hidden, hidden, queries, kv, hidden, hidden};
  for (int i = 0; i < static_cast<int>(norms.size()); ++i) {
    const int64_t size = norms[i].numel();
    const bool of_a_head = (i == Q_NORM || i == K_NORM) && size != widths[i];
    if (size != 0 || i >= ATTENDED) check_tensor({"norms", i}, norms[i], {of_a_head ? dim : widths[i]}, dtype, like);
  }
  const int64_t inputs[] = {hidden, hidden, hidden, queries, hidden, hidden, weights[GATE].size(0)};
  const int64_t outs[] = {ANY, ANY, kv, hidden, ANY, weights[GATE].size(0), hidden};
  for (int i = 0; i < PROJECTIONS; ++i) {
    check_tensor({"weights", i}, weights[i], {outs[i], inputs[i]}, dtype, like);
    check_tensor({"a", i}, a[i], {ANY, inputs[i]}, dtype, like);
    check_tensor({"b", i}, b[i], {weights[i].size(0), a[i].size(0)}, dtype, like);
    const bool biased = !biases.empty() && biases[i].numel() != 0;
    if (biased) check_tensor({"biases", i}, biases[i], {weights[i].size(0)}, dtype, like);
    const T* bias = biased ? static_cast<const T*>(biases[i].data_ptr()) : nullptr;
    layer.linears.push_back({weights[i], a[i], b[i], bias, static_cast<T>(scalings[i])});
  }
  return layer;
}

/// Calls f with a value of the dtype, which is also the one computed in.
template <class F>
auto with_wide_type(const char* name, const Tensor& like, const F& f) {
  STD_TORCH_CHECK(
      like.scalar_type() == ScalarType::Float || like.scalar_type() == ScalarType::Double, name, " is ",
      torch::headeronly::toString(like.scalar_type()), "; allowed: Float, Double");
  return like.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

Tensor rows_like(const Tensor& x, int64_t rows, int64_t columns) {
  return new_tensor(x, {rows, columns}, x.scalar_type());
}

Tensor viewed(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::view(x, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()));
}

/// y = scale y + x, elementwise.
template <class T>
void add(const Tensor& y, const Tensor& x, T scale = 1) {
  in_rows(y.size(0), y.numel(), [&](int64_t begin, int64_t end) {
    const Matrix<T> to = matrix<T>(y);
    const Matrix<const T> from = matrix<const T>(x);
    for (int64_t n = begin; n < end; ++n)
      for (int64_t d = 0; d < y.size(1); ++d) to.row(n)[d] = scale * to.row(n)[d] + from.row(n)[d];
  });
}

template <class T>
RmsScale<T> scale_of(const Layer<T>& layer, Norm_ which) {
  const Tensor& weight = layer.norms[which];
  return {data<T>(weight), weight.numel(), static_cast<T>(layer.parts.norm_offset), layer.epsilon};
}

struct Normed {
  Tensor y, inverse;
};

/// x itself, where there is no norm; otherwise in `y`, where that is given.
template <class T>
Normed normed(const Layer<T>& layer, Norm_ which, const Tensor& x, const OptionalTensor& y = std::nullopt) {
  if (!layer.has(which)) return {x, x};
  const int64_t rows = x.size(0), size = x.size(1);
  const Normed result{y ? *y : rows_like(x, rows, size), new_tensor(x, {rows}, x.scalar_type())};
  const RmsNorm<T> norm{matrix<const T>(x),    {}, {}, matrix<T>(result.y), static_cast<T*>(result.inverse.data_ptr()),
                        scale_of(layer, which)};
  const auto kernel = DIFFMAS_KERNEL(rms_norm<T>);
  in_rows(rows, 4 * rows * size, [&](int64_t begin, int64_t end) { kernel(norm, begin, end); });
  return result;
}

/// The gradient of x from that of its norm, with `residual` added where it is given. Without a norm, in `grad` itself.
/// `inverse` is that of the forward, and computed again where it is not given.
template <class T>
Tensor norm_gradients(
    const Layer<T>& layer, Norm_ which, const Tensor& grad, const Tensor& x, const OptionalTensor& inverse,
    const OptionalTensor& residual) {
  if (!layer.has(which)) {
    if (residual) add<T>(grad, *residual);
    return grad;
  }
  const int64_t rows = x.size(0), size = x.size(1);
  const Tensor grad_x = rows_like(x, rows, size);
  const RmsNorm<T> norm{
      matrix<const T>(x),
      matrix<const T>(grad),
      residual ? matrix<const T>(*residual) : Matrix<const T>{},
      matrix<T>(grad_x),
      inverse ? static_cast<T*>(inverse->data_ptr()) : nullptr,
      scale_of(layer, which)};
  const auto kernel = DIFFMAS_KERNEL(rms_norm_gradient<T>);
  in_rows(rows, 6 * rows * size, [&](int64_t begin, int64_t end) { kernel(norm, begin, end); });
  return grad_x;
}

template <class T>
RotateHeads<T> rotation(
    const Layer<T>& layer, Norm_ which, const Tensor& x, const Tensor& y, const Tensor& cos, const Tensor& sin) {
  const int64_t dim = cos.size(1);
  const Packed<const T> heads{data<T>(x), x.stride(0), dim};
  return {
      heads,
      {},
      {static_cast<T*>(y.data_ptr()), x.size(1), dim},
      layer.has(which) ? scale_of(layer, which) : RmsScale<T>{nullptr, dim, 0, 0},
      matrix<const T>(cos),
      matrix<const T>(sin),
      x.size(1) / dim,
      dim};
}

/// Heads `[N, heads, dim]` of `x [N, heads * dim]`, normalised where the layer has a norm for them (of a head each or of
/// all), and rotated.
template <class T>
Tensor rotated(const Layer<T>& layer, Norm_ which, const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t rows = x.size(0), dim = cos.size(1);
  const Tensor y = new_tensor(x, {rows, x.size(1) / dim, dim}, x.scalar_type());
  const RotateHeads<T> heads = rotation(layer, which, x, y, cos, sin);
  const auto kernel = DIFFMAS_KERNEL(rotate_heads<T>);
  in_rows(rows, 6 * rows * x.size(1), [&](int64_t begin, int64_t end) {
    kernel(heads, begin, end, scratch<T>(dim + PADDING));
  });
  return y;
}

template <class T>
Tensor rotated_gradients(
    const Layer<T>& layer, Norm_ which, const Tensor& grad, const Tensor& x, const Tensor& cos, const Tensor& sin) {
  const int64_t rows = x.size(0);
  const Tensor grad_x = rows_like(x, rows, x.size(1));
  RotateHeads<T> heads = rotation(layer, which, x, grad_x, cos, sin);
  heads.grad = packed<const T>(grad);
  const auto kernel = DIFFMAS_KERNEL(rotate_heads_gradient<T>);
  in_rows(rows, 10 * rows * x.size(1), [&](int64_t begin, int64_t end) {
    kernel(heads, begin, end, scratch<T>(heads.scale.dim + PADDING));
  });
  return grad_x;
}

template <class T>
GatedUnit<T> gated_unit(const Layer<T>& layer, const Tensor& gate, const Tensor& up) {
  return {
      matrix<const T>(gate),
      matrix<const T>(up),
      {},
      {},
      {},
      {},
      gate.size(1),
      static_cast<T>(layer.parts.slope),
      static_cast<T>(layer.parts.cubic)};
}

template <class T>
Tensor activated(const Layer<T>& layer, const Tensor& gate, const Tensor& up) {
  const Tensor y = rows_like(gate, gate.size(0), gate.size(1));
  GatedUnit<T> unit = gated_unit(layer, gate, up);
  unit.y = matrix<T>(y);
  const auto kernel = DIFFMAS_KERNEL(gated_unit<T>);
  in_rows(gate.size(0), 20 * gate.numel(), [&](int64_t begin, int64_t end) { kernel(unit, begin, end); });
  return y;
}

template <class T>
Tensors activation_gradients(const Layer<T>& layer, const Tensor& grad, const Tensor& gate, const Tensor& up) {
  const Tensor grad_gate = rows_like(gate, gate.size(0), gate.size(1));
  const Tensor grad_up = rows_like(gate, gate.size(0), gate.size(1));
  GatedUnit<T> unit = gated_unit(layer, gate, up);
  unit.grad = matrix<const T>(grad), unit.grad_gate = matrix<T>(grad_gate), unit.grad_up = matrix<T>(grad_up);
  const auto kernel = DIFFMAS_KERNEL(gated_unit_gradient<T>);
  in_rows(gate.size(0), 30 * gate.numel(), [&](int64_t begin, int64_t end) { kernel(unit, begin, end); });
  return {grad_gate, grad_up};
}

/// The rows of x that `index` names, or all of them.
template <class T>
Tensor chosen(const Tensor& x, const OptionalTensor& index) {
  if (!index) return x;
  const int64_t rows = index->size(0), size = x.size(1);
  const Tensor y = rows_like(x, rows, size);
  for (int64_t n = 0; n < rows; ++n)
    std::copy_n(matrix<const T>(x).row(data<int64_t>(*index)[n]), size, matrix<T>(y).row(n));
  return y;
}

/// y[index] += x.
template <class T>
void add_chosen(const Tensor& y, const Tensor& x, const OptionalTensor& index) {
  if (!index) return add<T>(y, x);
  for (int64_t n = 0; n < index->size(0); ++n)
    for (int64_t d = 0; d < y.size(1); ++d)
      matrix<T>(y).row(data<int64_t>(*index)[n])[d] += matrix<const T>(x).row(n)[d];
}

/// One of the states that the backward takes of every one of `rows` tokens: that between attention and MLP (0), and where
/// norms stand behind these, the result of attention (1) and of the MLP (2).
Tensor state_of(const Tensor& states, int64_t which, int64_t rows) {
  if (states.size(0) == rows) return states;
  Tensor whole = states;
  return torch::stable::narrow(whole, 0, which * rows, rows);
}

/// y = residual + scale norm(x), the state behind attention or MLP. Without a norm, x is y.
template <class T>
void join(const Layer<T>& layer, Norm_ which, const Tensor& x, const Tensor& residual, const Tensor& y) {
  normed(layer, which, x, y);
  add<T>(y, residual, static_cast<T>(layer.parts.residual_scale));
}

/// The gradient of the result x of attention or MLP from that of the state behind it.
template <class T>
Tensor join_gradients(const Layer<T>& layer, Norm_ which, const Tensor& grad, const Tensor& x) {
  Tensor scaled = grad;
  if (layer.parts.residual_scale != 1) {
    scaled = rows_like(grad, grad.size(0), grad.size(1));
    const T scale = static_cast<T>(layer.parts.residual_scale);
    for (int64_t n = 0; n < grad.size(0); ++n)
      for (int64_t d = 0; d < grad.size(1); ++d) matrix<T>(scaled).row(n)[d] = scale * matrix<const T>(grad).row(n)[d];
  }
  return norm_gradients(layer, which, scaled, x, std::nullopt, std::nullopt);
}

/// Returns how many there are: all `tokens`, where none are chosen.
int64_t check_outputs(const OptionalTensor& outputs, int64_t tokens, const Tensor& like) {
  if (!outputs) return tokens;
  check_tensor("outputs", *outputs, {ANY}, ScalarType::Long, like);
  check_contiguous("outputs", *outputs);
  for (int64_t n = 0; n < outputs->size(0); ++n) {
    const int64_t token = data<int64_t>(*outputs)[n];
    STD_TORCH_CHECK(token >= 0 && token < tokens, "outputs has ", token, "; allowed: 0 to ", tokens - 1);
  }
  return outputs->size(0);
}

/// The ranges of the `rows` outputs, looked at before anything is written.
void check_queries(const Rows& queries, int64_t rows, const Tensor& keys) {
  const int64_t batch = keys.size(0), capacity = keys.size(2), max_seqlen_k = queries.max_seqlen_k;
  check_index("query_begin", queries.q_begin, batch, keys);
  check_index("query_end", queries.q_end, batch, keys);
  check_index("query_starts", queries.starts, batch, keys);
  STD_TORCH_CHECK(queries.max_seqlen_q >= 0, "query_max_seqlen_q is ", queries.max_seqlen_q, "; allowed: 0 and above");
  STD_TORCH_CHECK(
      max_seqlen_k >= 0 && max_seqlen_k <= capacity, "max_seqlen_k is ", max_seqlen_k, "; allowed: 0 to ", capacity,
      ", the capacity of keys");
  const RowRanges ranges = queries.ranges();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = ranges.begin[b], last = ranges.end[b], count = last - first, start = ranges.starts[b];
    STD_TORCH_CHECK(
        0 <= first && first <= last && last <= rows, "query_begin[", b, "], query_end[", b, "] are ", first, ", ", last,
        "; allowed: 0 <= query_begin <= query_end <= ", rows);
    STD_TORCH_CHECK(
        count <= queries.max_seqlen_q, "query_max_seqlen_q is ", queries.max_seqlen_q, "; allowed: at least the ",
        count, " tokens of row ", b);
    STD_TORCH_CHECK(
        count == 0 || (start >= 0 && start + count <= max_seqlen_k), "query_starts[", b, "] is ", start,
        "; allowed: 0 to ", max_seqlen_k - count);
  }
}

void check_turns(const Tensor& cos, const Tensor& sin, int64_t tokens, const Tensor& like) {
  check_tensor("cos", cos, {tokens, cos.size(1)}, like.scalar_type(), like);
  check_tensor("sin", sin, {tokens, cos.size(1)}, like.scalar_type(), like);
}

void check_state(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, const Tensor& like) {
  check_tensor(name, tensor, {rows, columns}, like.scalar_type(), like);
}

/// A list may not be returned beside arguments that are written.
using States =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

States decoder_layer(
    const Tensor& h, const Tensor& cos, const Tensor& sin, const Tensors& norms, double epsilon, const Tensors& weights,
    const Tensors& biases, const Tensors& a, const Tensors& b, const std::vector<double>& scalings,
    const std::vector<double>& parts, const Tensor& keys, const Tensor& values, const Tensor& q_begin,
    const Tensor& q_end, const Tensor& starts, int64_t max_seqlen_q, const OptionalTensor& outputs,
    const Tensor& query_begin, const Tensor& query_end, const Tensor& query_starts, int64_t query_max_seqlen_q,
    int64_t max_seqlen_k, double softmax_scale, std::optional<int64_t> window, std::optional<double> softcap,
    std::optional<int64_t> chunk) {
  const Rows all{q_begin, q_end, starts, max_seqlen_q, max_seqlen_k};
  const Rows queries{query_begin, query_end, query_starts, query_max_seqlen_q, max_seqlen_k};
  check_dim("h", h, 2);
  const int64_t tokens = h.size(0), rows = check_outputs(outputs, tokens, h);
  return with_wide_type("h", h, [&](auto type) -> States {
    using T = decltype(type);
    const Layer<T> layer = make_layer<T>(h, cos, norms, epsilon, weights, biases, a, b, scalings, parts);
    check_state("h", h, ANY, weights[O].size(0), h);
    check_turns(cos, sin, tokens, h);
    const int64_t kv = weights[K].size(0), dim = cos.size(1);
    check_tensor("keys", keys, {ANY, kv / dim, ANY, dim}, h.scalar_type(), h);
    check_queries(queries, rows, keys);
    Tensor x = normed(layer, INPUT, h).y;
    const Tensor k = rows_like(h, tokens, kv), v = new_tensor(h, {tokens, kv / dim, dim}, h.scalar_type());
    const Tensor low_kv = apply(layer.of({K, V}), x, {k, as_matrix(v)});
    kv_append(rotated(layer, K_NORM, k, cos, sin), v, keys, values, all);

    x = chosen<T>(x, outputs);
    const Tensor q = rows_like(h, rows, weights[Q].size(0));
    const Tensor low_q = apply(layer.of({Q}), x, {q});
    const auto [out, lse] = cached_attention(
        rotated(layer, Q_NORM, q, chosen<T>(cos, outputs), chosen<T>(sin, outputs)), std::nullopt, std::nullopt, keys,
        values, queries, {softmax_scale, window, softcap, chunk});
    const bool behind = layer.has(ATTENDED);
    const Tensor states = rows_like(h, behind ? 3 * rows : rows, h.size(1));
    const Tensor middle = state_of(states, 0, rows), attended = behind ? state_of(states, 1, rows) : middle;
    const Tensor low_o = apply(layer.of({O}), as_matrix(out), {attended});
    join(layer, ATTENDED, attended, chosen<T>(h, outputs), middle);

    const Tensor gate = rows_like(h, rows, weights[GATE].size(0)), up = rows_like(h, rows, weights[GATE].size(0));
    const Tensor low_gate_up = apply(layer.of({GATE, UP}), normed(layer, MIDDLE, middle).y, {gate, up});
    const Tensor result = rows_like(h, rows, h.size(1)), fed = behind ? state_of(states, 2, rows) : result;
    const Tensor low_down = apply(layer.of({DOWN}), activated(layer, gate, up), {fed});
    join(layer, FED, fed, middle, result);
    return {result, k, q, out, lse, states, gate, up, low_q, low_kv, low_o, low_gate_up, low_down};
  });
}

Tensors decoder_layer_backward_output(
    const Tensor& grad, const Tensor& cos, const Tensor& sin, const Tensor& q, const Tensor& out, const Tensor& states,
    const Tensor& gate, const Tensor& up, const Tensor& low_o, const Tensor& low_gate_up, const Tensor& low_down,
    const Tensors& norms, double epsilon, const Tensors& weights, const Tensors& biases, const Tensors& a,
    const Tensors& b, const std::vector<double>& scalings, const std::vector<double>& parts,
    const OptionalTensor& outputs) {
  return with_wide_type("grad", grad, [&](auto type) -> Tensors {
    using T = decltype(type);
    const Layer<T> layer = make_layer<T>(grad, cos, norms, epsilon, weights, biases, a, b, scalings, parts);
    check_turns(cos, sin, cos.size(0), grad);
    const int64_t rows = check_outputs(outputs, cos.size(0), grad), dim = cos.size(1);
    const int64_t hidden = weights[O].size(0), inner = weights[GATE].size(0);
    check_state("grad", grad, rows, hidden, grad);
    check_tensor("out", out, {rows, weights[Q].size(0) / dim, dim}, grad.scalar_type(), grad);
    check_contiguous("out", out);
    check_state("states", states, layer.has(ATTENDED) ? 3 * rows : rows, hidden, grad);
    const Tensor middle = state_of(states, 0, rows);
    check_state("gate", gate, rows, inner, grad);
    check_state("up", up, rows, inner, grad);
    check_state("q", q, rows, weights[Q].size(0), grad);
    check_state("low_o", low_o, rows, a[O].size(0), grad);
    check_state("low_gate_up", low_gate_up, rows, a[GATE].size(0) + a[UP].size(0), grad);
    check_state("low_down", low_down, rows, a[DOWN].size(0), grad);
    Tensors of_down, of_gate_up, of_o;
    const Tensor grad_fed = join_gradients(layer, FED, grad, state_of(states, 2, rows));
    const Tensor grad_act = gradients(layer.of({DOWN}), activated(layer, gate, up), low_down, {grad_fed}, of_down);
    const Tensors inner_grads = activation_gradients(layer, grad_act, gate, up);
    const Normed forward = normed(layer, MIDDLE, middle);
    const Tensor grad_x = gradients(layer.of({GATE, UP}), forward.y, low_gate_up, inner_grads, of_gate_up);
    const Tensor grad_middle = norm_gradients(layer, MIDDLE, grad_x, middle, forward.inverse, grad);
    const Tensor grad_attended = join_gradients(layer, ATTENDED, grad_middle, state_of(states, 1, rows));
    const Tensor grad_out = gradients(layer.of({O}), as_matrix(out), low_o, {grad_attended}, of_o);
    const Tensor queries = rotated(layer, Q_NORM, q, chosen<T>(cos, outputs), chosen<T>(sin, outputs));
    Tensors result{grad_middle, viewed(grad_out, {rows, queries.size(1), queries.size(2)}), queries};
    for (const Tensors* adapters : {&of_o, &of_gate_up, &of_down})
      result.insert(result.end(), adapters->begin(), adapters->end());
    return result;
  });
}

Tensors decoder_layer_backward_input(
    const Tensor& grad_q, const Tensor& grad_k, const Tensor& grad_v, const Tensor& grad_middle, const Tensor& h,
    const Tensor& cos, const Tensor& sin, const Tensor& k, const Tensor& q, const Tensor& low_q, const Tensor& low_kv,
    const Tensors& norms, double epsilon, const Tensors& weights, const Tensors& biases, const Tensors& a,
    const Tensors& b, const std::vector<double>& scalings, const std::vector<double>& parts,
    const OptionalTensor& outputs) {
  check_dim("h", h, 2);
  const int64_t tokens = h.size(0), rows = check_outputs(outputs, tokens, h);
  return with_wide_type("h", h, [&](auto type) -> Tensors {
    using T = decltype(type);
    const Layer<T> layer = make_layer<T>(h, cos, norms, epsilon, weights, biases, a, b, scalings, parts);
    const int64_t hidden = weights[O].size(0), kv = weights[K].size(0);
    check_state("h", h, tokens, hidden, h);
    check_turns(cos, sin, tokens, h);
    check_state("k", k, tokens, kv, h);
    check_state("q", q, rows, weights[Q].size(0), h);
    check_state("grad_middle", grad_middle, rows, hidden, h);
    check_state("low_q", low_q, rows, a[Q].size(0), h);
    check_state("low_kv", low_kv, tokens, a[K].size(0) + a[V].size(0), h);
    const int64_t dim = cos.size(1);
    check_tensor("grad_q", grad_q, {rows, q.size(1) / dim, dim}, h.scalar_type(), h);
    check_tensor("grad_k", grad_k, {tokens, kv / dim, dim}, h.scalar_type(), h);
    check_tensor("grad_v", grad_v, {tokens, kv / dim, dim}, h.scalar_type(), h);
    check_contiguous("grad_v", grad_v);
    Tensors of_q, of_kv;
    const Tensor owed_k = rotated_gradients(layer, K_NORM, grad_k, k, cos, sin);
    const Tensor owed_q = rotated_gradients(layer, Q_NORM, grad_q, q, chosen<T>(cos, outputs), chosen<T>(sin, outputs));
    const Normed forward = normed(layer, INPUT, h);
    const Tensor grad_x = gradients(layer.of({K, V}), forward.y, low_kv, {owed_k, as_matrix(grad_v)}, of_kv);
    const Tensor grad_of_q = gradients(layer.of({Q}), chosen<T>(forward.y, outputs), low_q, {owed_q}, of_q);
    add_chosen<T>(grad_x, grad_of_q, outputs);
    Tensor residual = grad_middle;
    if (outputs) {
      residual = rows_like(h, tokens, hidden);
      std::fill_n(static_cast<T*>(residual.data_ptr()), residual.numel(), T(0));
      add_chosen<T>(residual, grad_middle, outputs);
    }
    Tensors result{norm_gradients(layer, INPUT, grad_x, h, forward.inverse, residual)};
    for (const Tensors* adapters : {&of_q, &of_kv}) result.insert(result.end(), adapters->begin(), adapters->end());
    return result;
  });
}

}  // namespace

}  // namespace diffmas

#define LAYER                                                                                                    \
  "Tensor[] norms, float epsilon, Tensor[] weights, Tensor[] biases, Tensor[] a, Tensor[] b, float[] scalings, " \
  "float[] parts, "

STABLE_TORCH_LIBRARY_FRAGMENT(diffmas, m) {
  m.def(
      "decoder_layer(Tensor h, Tensor cos, Tensor sin, " LAYER
      "Tensor(a!) keys, Tensor(b!) values, Tensor q_begin, Tensor q_end, Tensor starts, int max_seqlen_q, Tensor? "
      "outputs, "
      "Tensor query_begin, Tensor query_end, Tensor query_starts, int query_max_seqlen_q, int max_seqlen_k, float "
      "softmax_scale, int? window, float? softcap, int? chunk) -> "
      "(Tensor result, Tensor k, Tensor q, Tensor out, Tensor lse, Tensor states, "
      "Tensor gate, Tensor up, "
      "Tensor low_q, Tensor low_kv, Tensor low_o, Tensor low_gate_up, Tensor low_down)");
  m.def(
      "decoder_layer_backward_output(Tensor grad, Tensor cos, Tensor sin, Tensor q, Tensor out, Tensor states, "
      "Tensor gate, Tensor up, Tensor low_o, Tensor low_gate_up, Tensor low_down, " LAYER
      "Tensor? outputs) -> Tensor[]");
  m.def(
      "decoder_layer_backward_input(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_middle, Tensor h, "
      "Tensor cos, Tensor sin, Tensor k, Tensor q, Tensor low_q, Tensor low_kv, " LAYER "Tensor? outputs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(diffmas, CPU, m) {
  m.impl("decoder_layer", TORCH_BOX(&diffmas::decoder_layer));
  m.impl("decoder_layer_backward_output", TORCH_BOX(&diffmas::decoder_layer_backward_output));
  m.impl("decoder_layer_backward_input", TORCH_BOX(&diffmas::decoder_layer_backward_input));
}

#include "learned_attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace baseq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Queries at once: few enough that little is computed above the diagonal, enough for products of full speed.
constexpr int64_t kBlockRows = 128;

/// The queries that share a key/value head, [batch * num_kv_heads, num_heads / num_kv_heads, seq, head_dim].
Tensor grouped(const Tensor& x, int64_t num_kv_heads) {
  return x.reshape({x.size(0) * num_kv_heads, x.size(1) / num_kv_heads, x.size(2), x.size(3)});
}

/// fn(block, begin, rows, keys): queries begin..begin + rows see the first `keys` keys.
template <class Fn>
void for_each_block(int64_t seq, Fn&& fn) {
  int64_t block = 0;
  for (int64_t begin = 0; begin < seq; begin += kBlockRows, ++block) {
    const int64_t rows = std::min(kBlockRows, seq - begin);
    fn(block, begin, rows, begin + rows);
  }
}

/// Rows of a block from a grouped tensor, [n, group * rows, head_dim].
Tensor block_of(const Tensor& x, int64_t begin, int64_t rows) {
  return x.narrow(2, begin, rows).reshape({x.size(0), x.size(1) * rows, x.size(3)});
}

struct CausalAttention : torch::autograd::Function<CausalAttention> {
  static Tensor forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v, double scaling,
                        int64_t products_type) {
    const auto products = static_cast<at::ScalarType>(products_type);
    const int64_t kv_heads = k.size(1), seq = q.size(2), dim = q.size(3);
    const Tensor queries = grouped(q * scaling, kv_heads), keys = k.reshape({-1, seq, dim});
    const Tensor values = v.to(products).reshape({-1, seq, dim});
    const int64_t n = queries.size(0), group = queries.size(1);
    const int64_t side = std::min(seq, kBlockRows);
    const Tensor above = at::ones({side, side}, q.options().dtype(at::kBool)).triu_(1);
    Tensor out = at::empty_like(queries);
    variable_list saved = {queries.to(products), keys.to(products), values};
    for_each_block(seq, [&](int64_t, int64_t begin, int64_t rows, int64_t visible) {
      const Tensor scores = at::bmm(block_of(queries, begin, rows), keys.narrow(1, 0, visible).transpose(1, 2));
      scores.view({n, group, rows, visible})
          .narrow(3, begin, rows)
          .masked_fill_(above.narrow(0, 0, rows).narrow(1, 0, rows), -std::numeric_limits<double>::infinity());
      const Tensor probabilities = at::softmax(scores, -1).to(products);
      out.narrow(2, begin, rows)
          .copy_(at::bmm(probabilities, values.narrow(1, 0, visible)).view({n, group, rows, dim}));
      saved.push_back(probabilities);
    });
    context->save_for_backward(std::move(saved));
    context->saved_data["scaling"] = scaling;
    return out.view(q.sizes());
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &queries = saved[0], &keys = saved[1], &values = saved[2];
    const double scaling = context->saved_data["scaling"].toDouble();
    const bool need_q = context->needs_input_grad(0), need_k = context->needs_input_grad(1);
    const bool need_v = context->needs_input_grad(2);
    const at::TensorOptions sums = grads[0].options();
    const int64_t batch = grads[0].size(0), n = queries.size(0), group = queries.size(1);
    const int64_t seq = queries.size(2), dim = queries.size(3), kv_heads = n / batch;
    const Tensor out_grad = grouped(grads[0].to(queries.scalar_type()), kv_heads);
    Tensor q_grad, k_grad, v_grad;
    if (need_q) q_grad = at::empty(queries.sizes(), sums);
    if (need_k) k_grad = at::zeros(keys.sizes(), sums);
    if (need_v) v_grad = at::zeros(values.sizes(), sums);
    for_each_block(seq, [&](int64_t block, int64_t begin, int64_t rows, int64_t visible) {
      const Tensor& probabilities = saved[static_cast<size_t>(3 + block)];
      const Tensor block_grad = block_of(out_grad, begin, rows);
      if (need_v) v_grad.narrow(1, 0, visible).add_(at::bmm(probabilities.transpose(1, 2), block_grad));
      if (!need_q && !need_k) return;
      const Tensor probability_grad = at::bmm(block_grad, values.narrow(1, 0, visible).transpose(1, 2));
      const Tensor score_grad =
          at::_softmax_backward_data(probability_grad, probabilities, -1, probabilities.scalar_type());
      if (need_q) {
        q_grad.narrow(2, begin, rows)
            .copy_(at::bmm(score_grad, keys.narrow(1, 0, visible)).view({n, group, rows, dim}));
      }
      if (need_k) {
        k_grad.narrow(1, 0, visible).add_(at::bmm(score_grad.transpose(1, 2), block_of(queries, begin, rows)));
      }
    });
    if (need_q) q_grad = q_grad.mul_(scaling).view(grads[0].sizes());
    if (need_k) k_grad = k_grad.view({batch, kv_heads, seq, dim});  // scaling is in the queries
    if (need_v) v_grad = v_grad.view({batch, kv_heads, seq, dim});
    return {q_grad, k_grad, v_grad, Tensor(), Tensor()};
  }
};

}  // namespace

Tensor learned_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scaling, at::ScalarType products) {
  const bool fits = q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() && k.size(1) > 0 &&
                    q.size(1) % k.size(1) == 0 && q.size(0) == k.size(0) && q.size(2) == k.size(2) &&
                    q.size(3) == k.size(3);
  TORCH_CHECK(fits, "learned_attention: q is ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(),
              ", expected [batch, num_heads, seq, head_dim] and twice [batch, num_kv_heads, seq, head_dim]");
  return CausalAttention::apply(q, k, v, scaling, static_cast<int64_t>(products));
}

}  // namespace baseq

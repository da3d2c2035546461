#pragma once

#include "baseq/tensor.h"

namespace baseq {

/// Causal softmax(scaling q k^T) v for learning, where it takes less than half the time of LibTorch's float32 kernel:
/// scores and their softmax in float32, the products with probabilities and gradients in `products`. The probabilities
/// are kept for the backward pass, in `products`; what needs no gradient is not computed.
/// @param q        [batch, num_heads, seq, head_dim], num_heads a multiple of num_kv_heads
/// @param k, v     [batch, num_kv_heads, seq, head_dim]
/// @param products dtype of the products behind the scores
/// Returns the attended values in the shape and dtype of q; differentiable.
Tensor learned_attention(const Tensor& q, const Tensor& k, const Tensor& v, double scaling, at::ScalarType products);

}  // namespace baseq

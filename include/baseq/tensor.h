#pragma once

#include <ATen/core/Tensor.h>

/// baseq: post-training quantization of large language models.
///
/// Letters used throughout: weights are `[out_features, in_features]`, activations `[batch, seq, hidden]`, and vectors
/// are rows: `y = x W^T + b`.
namespace baseq {
using at::Tensor;
}  // namespace baseq

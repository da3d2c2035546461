#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

/// baseq: post-training quantization of large language models.
///
/// Letters used throughout: weights are `[out_features, in_features]`, activations `[batch, seq, hidden]`, and vectors
/// are rows: `y = x W^T + b`.
namespace baseq {
using at::Tensor;

/// How exact a product of float32 matrices is, by PyTorch's names (`torch.set_float32_matmul_precision`). Its sums are
/// float32 in every case, and so is its result.
enum class MatmulPrecision : uint8_t {
  kHighest,  ///< float32
  kHigh,     ///< the factors are rounded to TF32 (10 bits of mantissa) on CUDA; float32 on the CPU
  kMedium,   ///< to bfloat16 (7 bits) on the CPU where the processor multiplies it, else float32; TF32 on CUDA
};

}  // namespace baseq

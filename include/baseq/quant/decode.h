#pragma once

#include "baseq/quant/low_rank.h"
#include "baseq/quant/quantize.h"

namespace baseq {

/// A quantized linear with a low-rank sub-branch as a checkpoint stores it: `W = dequantize(weight_packed) + B A`,
/// [out_features, in_features].
struct PackedLinear {
  /// A static grid: `num_bits`, kTensor, kChannel, or kGroup with a group size that is a multiple of 8 (of 4 above four
  /// bits).
  QuantSpec spec{};
  int64_t in_features = 0;
  Tensor weight_packed{};  ///< int32 [out_features, ceil(in_features * num_bits / 32)], of pack_to_int32
  Tensor weight_scale{};   ///< float32, bfloat16 or float16 [out_features, groups]; kTensor: [1, 1]
  Tensor
      weight_zero_point{};  ///< undefined, or int32 [ceil(out_features * num_bits / 32), groups], of pack_zero_points
  LowRankFactors lora{};    ///< bfloat16 or int8; undefined: no sub-branch
  Tensor bias{};            ///< float32 [out_features] or undefined
};

/// A rounded weight as decode_linear() takes it.
///
///     const QuantizedWeight weight = gptq(w, second_moments(x), {.num_bits = 4}).weight;
///     const Tensor y = decode_linear(pack_linear(weight), x[0]);
///
/// @param lora a correction next to the codes, of store_factors(); undefined: none
/// @param bias float32 [out_features] or undefined
PackedLinear pack_linear(const QuantizedWeight& weight, const LowRankFactors& lora = {}, const Tensor& bias = {});

/// y = W x + bias of one token on the CPU: t = A x, then one pass over the packed weight in which every row's sum
/// starts with its part of B t. Nothing is dequantized to memory; sums are float32.
/// @param x  [in_features] or [1, in_features], any floating type
/// @return   [out_features] or [1, out_features] in the dtype of x
/// Throws c10::Error when a shape, dtype or device is not as PackedLinear says.
Tensor decode_linear(const PackedLinear& linear, const Tensor& x);

}  // namespace baseq

#pragma once

#include "baseq/conv/algorithm.h"
#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// Zeros around the input, in samples. One side alone makes a causal convolution.
struct Padding {
  int64_t top = 0, bottom = 0, left = 0, right = 0;

  static Padding all(int64_t samples) { return {samples, samples, samples, samples}; }
};

/**
 * Convolution of stride 1 (a correlation, as in PyTorch) by a bilinear algorithm over tiles: the transforms of
 * arXiv 2407.02913 with one matrix product for each of the algorithm's products.
 *
 * float32 and float64 give the same type. int8 gives int32, bit-identical to the direct convolution: values are
 * transformed to int16, accumulated in int32 (in int64 when the weights allow a sum beyond it) and divided exactly.
 *
 *     const ConvAlgorithm2d tiles = tile_algorithm(sfc_algorithm(6, 7, 3));
 *     const Tensor y = conv2d_sfc(x, weight, {}, tiles, Padding::all(1));  // as at::conv2d(x, weight, {}, 1, 1)
 *
 * @param x       `[batch, in_channels, height, width]`, contiguous or channels-last; channels-last saves a copy
 * @param weight  `[out_channels, in_channels, rows.taps, cols.taps]`, of the type of `x`
 * @param bias    `[out_channels]` of the type of the result, or undefined
 * @return        `[batch, out_channels, height + top + bottom - rows.taps + 1, ...]`, channels-last
 * @throws c10::Error when shapes or types do not fit, or when int8 values of this algorithm need more than int16
 */
Tensor conv2d_sfc(const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvAlgorithm2d& algorithm,
                  const Padding& padding = {});

/// The same of `x` `[batch, in_channels, length]` and `weight` `[out_channels, in_channels, taps]`; padding left and
/// right.
Tensor conv1d_sfc(const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvAlgorithm& algorithm,
                  const Padding& padding = {});

}  // namespace baseq
#pragma GCC visibility pop

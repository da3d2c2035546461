#pragma once

#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/**
 * A bilinear algorithm for `outputs` neighbouring outputs of a correlation with `taps` taps:
 *
 *     y[k] = sum_j x[k + j] w[j] = (output_transform ((filter_transform w) * (input_transform x)))[k] / divisor
 *
 * with L = outputs + taps - 1 samples of input and T element-wise products. The matrices are exact: int64 on the CPU.
 */
struct ConvAlgorithm {
  Tensor input_transform{};   ///< B^T `[T, L]`
  Tensor filter_transform{};  ///< G `[T, taps]`
  Tensor output_transform{};  ///< divisor * A^T `[outputs, T]`
  int64_t divisor = 1;
  int64_t outputs = 1, taps = 1;
  int64_t points = 0;  ///< of the symbolic Fourier transform; 0 for other algorithms

  int64_t num_inputs() const { return outputs + taps - 1; }
  int64_t num_products() const { return input_transform.size(0); }
};

/// SFC-points(outputs, taps) (arXiv 2407.02913): a circular correlation of 3, 4 or 6 points by the symbolic Fourier
/// transform, whose entries are 0 and +-1, and one product for each tap of an output that the circle gets wrong. The
/// first products are those of the circle: a real frequency has one, a conjugate pair three. Throws c10::Error when
/// `points` is another number or the circle is longer than the outputs + taps - 1 samples.
ConvAlgorithm sfc_algorithm(int64_t points, int64_t outputs, int64_t taps);

/// Winograd's F(outputs, taps) (arXiv 1509.09308) on the points 0, 1, -1, 2, -2, 1/2, -1/2 and infinity, of which it
/// takes outputs + taps - 1. The rows of B^T and A^T have no common scale taken out; the fractions of G are multiplied
/// by `divisor`. Throws c10::Error for more points than these.
ConvAlgorithm winograd_algorithm(int64_t outputs, int64_t taps);

/// One output from `taps` products: the axis along which a two-dimensional algorithm saves nothing.
ConvAlgorithm direct_algorithm(int64_t taps);

/// How an algorithm for rows and one for columns make one for tiles.
enum class ConvForm {
  kFolded,    ///< every product of the rows with every one of the columns
  kSymbolic,  ///< two frequencies that are conjugate along one axis share their transforms: fewer products (SFC only)
};

/**
 * The algorithm of a tile of rows.outputs x cols.outputs outputs. With T = rows.num_products() * cols.num_products(),
 * element (i, j) of a transform of the tile standing at i * cols.num_products() + j:
 *
 *     P x = input_mix vec(B_rows^T x B_cols),  Q w = filter_mix vec(G_rows w G_cols^T)
 *     y = A_rows^T unvec(output_mix (Q w * P x)) A_cols / divisor
 *
 * The mixes are undefined in the folded form, where they would be identities.
 */
struct ConvAlgorithm2d {
  ConvAlgorithm rows{}, cols{};
  ConvForm form = ConvForm::kFolded;
  Tensor input_mix{};   ///< int64 `[products, T]`
  Tensor filter_mix{};  ///< int64 `[products, T]`
  Tensor output_mix{};  ///< int64 `[T, products]`
  int64_t divisor = 1;

  int64_t num_products() const;
  Tensor input_matrix() const;   ///< P, int64 `[products, rows.num_inputs() * cols.num_inputs()]`
  Tensor filter_matrix() const;  ///< Q, int64 `[products, rows.taps * cols.taps]`
  Tensor output_matrix() const;  ///< int64 `[rows.outputs * cols.outputs, products]`, over `divisor`
};

/// Throws c10::Error when the symbolic form is asked of algorithms that are not SFC with the same number of points.
ConvAlgorithm2d tile_algorithm(ConvAlgorithm rows, ConvAlgorithm cols, ConvForm form = ConvForm::kFolded);
/// The same algorithm along both axes:
///
///     const ConvAlgorithm2d tiles = tile_algorithm(sfc_algorithm(6, 7, 3));  // 7 x 7 outputs of a 3 x 3 kernel
///     std::cout << tiles.num_products() << " products in place of " << 7 * 7 * 3 * 3 << "\n";
ConvAlgorithm2d tile_algorithm(const ConvAlgorithm& axis, ConvForm form = ConvForm::kFolded);

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

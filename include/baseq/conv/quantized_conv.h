#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "baseq/conv/conv.h"
#include "baseq/quant/quantize.h"
#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// The grids of a convolution in the domain of its algorithm's products, which arXiv 2407.02913 calls frequencies.
struct ConvQuantization {
  /// kChannel: a scale for each frequency and output channel, `[OC, T, T]` in the paper; kTensor: one.
  QuantSpec weights{.num_bits = 8};
  /// kChannel: a scale for each frequency, `[T, T]` in the paper; kTensor: one. Static, from calibration data.
  QuantSpec activations{.num_bits = 8};
  std::optional<MseSearch> search{};  ///< of the scales, by search_qparams; without it they span the whole range
};

/// A convolution of stride 1 whose products are of integers. Both grids are symmetric.
struct QuantizedConv2d {
  ConvAlgorithm2d algorithm{};
  Padding padding{};
  QuantSpec weights{}, activations{};
  Tensor weight_codes{};  ///< int8 `[products, out_channels, in_channels]`
  Tensor weight_scale{};  ///< float32 `[products, out_channels]`
  Tensor input_scale{};   ///< float32 `[products]`
  Tensor bias{};          ///< float32 `[out_channels]`, or undefined
};

/// The transforms of `x` `[batch, in_channels, height, width]`, float32 `[products, tiles, in_channels]`.
Tensor transformed_input(const Tensor& x, const ConvAlgorithm2d& algorithm, const Padding& padding);
/// The transforms of `weight` `[out_channels, in_channels, rows.taps, cols.taps]`, float32 `[products, out_channels,
/// in_channels]`. Differentiable.
Tensor transformed_weight(const Tensor& weight, const ConvAlgorithm2d& algorithm);

/**
 * @param weight  `[out_channels, in_channels, rows.taps, cols.taps]`
 * @param bias    `[out_channels]` or undefined
 * @param x       what the layer reads, `[batch, in_channels, height, width]`: gives the scales of the activations
 * @throws c10::Error when shapes do not fit or a grid is asymmetric, dynamic or in groups
 */
QuantizedConv2d quantize_conv2d(const Tensor& weight, const Tensor& bias, const Tensor& x,
                                const ConvAlgorithm2d& algorithm, const Padding& padding,
                                const ConvQuantization& quantization = {});

/**
 * The same computation by tensor operations in floating point, differentiable in everything that needs a gradient;
 * rounding lets it through (fake_quantize).
 *
 * @param weight                 of the convolution, as for quantize_conv2d
 * @param log_weight_scale       natural logarithms `[products, out_channels]`, or `[1, 1]` for kTensor
 * @param log_input_scale        the same `[products]` or `[1]`
 */
Tensor simulate_conv2d(const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvAlgorithm2d& algorithm,
                       const Padding& padding, const ConvQuantization& quantization, const Tensor& log_weight_scale,
                       const Tensor& log_input_scale);

/// Runs a QuantizedConv2d on the CPU with int8 matrix products: AVX-512 VNNI where the processor has it, products of
/// int16 elsewhere.
///
///     const auto tiles = tile_algorithm(sfc_algorithm(6, 7, 3));
///     const IntegerConv2d conv(quantize_conv2d(weight, bias, calibration, tiles, Padding::all(1)));
///     const Tensor y = conv(x.contiguous(at::MemoryFormat::ChannelsLast));
class IntegerConv2d {
 public:
  explicit IntegerConv2d(QuantizedConv2d layer);
  ~IntegerConv2d();
  IntegerConv2d(IntegerConv2d&&) noexcept;

  /// float32 `[batch, out_channels, ...]`, channels-last, of float32 `x`; channels-last `x` saves a copy.
  Tensor operator()(const Tensor& x) const;
  const QuantizedConv2d& layer() const;

 private:
  struct Prepared;
  std::unique_ptr<const Prepared> prepared_;
};

/// Learning of one convolution's weights, bias and scales (Adam; rounding lets gradients through).
struct ConvDistillation {
  int64_t steps = 100;
  int64_t batch_size = 4;               ///< images a step, drawn without order
  double weight_learning_rate = 0.002;  ///< in root mean squares of the weight; the bias in those of the output
  double scale_learning_rate = 0.005;   ///< of the logarithms of the scales
  int64_t seed = 0;
};

/// Both squared errors are means over all images, at the scales of quantize_conv2d and after learning.
struct DistilledConv2d {
  QuantizedConv2d layer{};
  double error_before = 0, error_after = 0;
};

/**
 * quantize_conv2d, then the weight, the bias and the logarithms of all scales by least squared error of the output
 * (arXiv 2407.02913, layer by layer, from the float model). The start is kept when learning does not improve on it.
 *
 *     const DistilledConv2d learned = distill_conv2d(weight, bias, x, target, tiles, Padding::all(1), {}, {.steps =
 * 50}); const IntegerConv2d conv(learned.layer);
 *
 * @param x       `[images, in_channels, height, width]`, what the layer reads in the quantized model
 * @param target  what the float layer gives in the float model, before its activation function
 */
DistilledConv2d distill_conv2d(const Tensor& weight, const Tensor& bias, const Tensor& x, const Tensor& target,
                               const ConvAlgorithm2d& algorithm, const Padding& padding,
                               const ConvQuantization& quantization, const ConvDistillation& distillation = {});

/// A layer of a network without branches.
struct ConvLayer {
  Tensor weight{}, bias{};  ///< float32
  Padding padding{};
  std::function<Tensor(const Tensor&)> activation{};  ///< after the convolution; empty for none
  ConvAlgorithm2d algorithm{};
  ConvQuantization quantization{};
};

/// Quantizes the layers in order, each on what the quantized ones before it give for `x` and towards what the float
/// ones give. With `steps` 0 nothing is learned. `on_layer` hears of each, may be empty.
std::vector<QuantizedConv2d> calibrate_layers(const std::vector<ConvLayer>& layers, const Tensor& x,
                                              const ConvDistillation& distillation,
                                              const std::function<void(const DistilledConv2d&)>& on_layer = {});

}  // namespace baseq
#pragma GCC visibility pop

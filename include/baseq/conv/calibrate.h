#pragma once

#include <functional>
#include <vector>

#include "baseq/conv/quantized_conv.h"

#pragma GCC visibility push(default)
namespace baseq {

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
  QuantizedConv2d layer;
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

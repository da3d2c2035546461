#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/GradMode.h>
#include <torch/optim/adam.h>

#include <cmath>

#include "baseq/conv/quantized_conv.h"

namespace baseq {
namespace {

Tensor leaf(const Tensor& value) { return value.detach().clone().requires_grad_(true); }

double mean_squared_error(const Tensor& a, const Tensor& b) {
  return (a - b).square().mean(at::kDouble).item<double>();
}

/// The scales that a simulation takes: one where the grid has one for all.
Tensor log_scale(const Tensor& scale, const QuantSpec& spec) {
  const Tensor logarithm = scale.log();
  return spec.strategy == Strategy::kTensor ? logarithm.flatten().slice(0, 0, 1) : logarithm;
}

}  // namespace

DistilledConv2d distill_conv2d(const Tensor& weight, const Tensor& bias, const Tensor& x, const Tensor& target,
                               const ConvAlgorithm2d& algorithm, const Padding& padding,
                               const ConvQuantization& quantization, const ConvDistillation& distillation) {
  TORCH_CHECK(distillation.steps >= 0 && distillation.batch_size >= 1, "distill_conv2d: steps is ", distillation.steps,
              " and batch_size ", distillation.batch_size, ", expected at least 0 and 1");
  QuantizedConv2d start = quantize_conv2d(weight, bias, x, algorithm, padding, quantization);
  const Tensor first = IntegerConv2d(start)(x);
  TORCH_CHECK(target.sizes() == first.sizes(), "distill_conv2d: target is ", target.sizes(), ", expected ",
              first.sizes());
  DistilledConv2d result{.layer = start, .error_before = mean_squared_error(first, target)};
  result.error_after = result.error_before;
  if (distillation.steps == 0) return result;

  const c10::AutoGradMode with_gradients(true);
  const Tensor w = leaf(weight.to(at::kFloat)), weight_scale = leaf(log_scale(start.weight_scale, start.weights)),
               input_scale = leaf(log_scale(start.input_scale, start.activations));
  const Tensor b = bias.defined() ? leaf(bias.to(at::kFloat)) : Tensor();
  const auto root_mean_square = [](const Tensor& t) { return t.detach().square().mean().sqrt().item<double>(); };
  std::vector<torch::optim::OptimizerParamGroup> groups;
  const auto add_group = [&](std::vector<Tensor> parameters, double learning_rate) {
    groups.emplace_back(std::move(parameters), std::make_unique<torch::optim::AdamOptions>(learning_rate));
  };
  add_group({w}, distillation.weight_learning_rate * root_mean_square(w));
  if (b.defined()) add_group({b}, distillation.weight_learning_rate * root_mean_square(target));
  add_group({weight_scale, input_scale}, distillation.scale_learning_rate);
  torch::optim::Adam optimizer(groups);
  std::vector<double> rates;
  for (const auto& group : optimizer.param_groups()) rates.push_back(group.options().get_lr());

  at::Generator generator = at::detail::createCPUGenerator(distillation.seed);
  for (int64_t step = 0; step < distillation.steps; ++step) {
    const double decay =
        0.5 * (1 + std::cos(M_PI * static_cast<double>(step) / static_cast<double>(distillation.steps)));
    for (size_t i = 0; i < rates.size(); ++i) optimizer.param_groups()[i].options().set_lr(rates[i] * decay);
    const Tensor images = at::randperm(x.size(0), generator, at::TensorOptions(at::kLong))
                              .slice(0, 0, std::min(distillation.batch_size, x.size(0)));
    const Tensor y =
        simulate_conv2d(x.index_select(0, images), w, b, algorithm, padding, quantization, weight_scale, input_scale);
    optimizer.zero_grad();
    (y - target.index_select(0, images)).square().mean().backward();
    optimizer.step();
  }

  const at::NoGradGuard no_grad;
  QuantizedConv2d learned = start;
  const Tensor filters = transformed_weight(w, algorithm);
  const QParams of_weight{weight_scale.exp().reshape({-1, 1}), {}};
  learned.weight_codes = quantize(filters, of_weight, quantization.weights);
  learned.weight_scale = weight_scale.exp().expand(start.weight_scale.sizes()).contiguous();
  learned.input_scale = input_scale.exp().expand(start.input_scale.sizes()).contiguous();
  if (b.defined()) learned.bias = b.detach();
  const double error = mean_squared_error(IntegerConv2d(learned)(x), target);
  if (error < result.error_before) {
    result.layer = learned;
    result.error_after = error;
  }
  return result;
}

std::vector<QuantizedConv2d> calibrate_layers(const std::vector<ConvLayer>& layers, const Tensor& x,
                                              const ConvDistillation& distillation,
                                              const std::function<void(const DistilledConv2d&)>& on_layer) {
  std::vector<QuantizedConv2d> result;
  const at::NoGradGuard no_grad;
  Tensor real = x, quantized = x;
  for (const ConvLayer& layer : layers) {
    const Tensor bias = layer.bias;
    const Padding& p = layer.padding;
    const Tensor target = at::conv2d(at::constant_pad_nd(real, {p.left, p.right, p.top, p.bottom}), layer.weight, bias);
    const DistilledConv2d distilled =
        distill_conv2d(layer.weight, bias, quantized, target, layer.algorithm, p, layer.quantization, distillation);
    if (on_layer) on_layer(distilled);
    const Tensor y = IntegerConv2d(distilled.layer)(quantized);
    quantized = layer.activation ? layer.activation(y) : y;
    real = layer.activation ? layer.activation(target) : target;
    result.push_back(distilled.layer);
  }
  return result;
}

}  // namespace baseq

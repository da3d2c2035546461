/// A small pretrained network of 3x3 convolutions, quantized by symbolic Fourier transforms: waifu2x, which doubles a
/// photograph.
///
///     conv_network WAIFU2X.safetensors [THREADS] [LEARNING_STEPS] [BITS...]
///
/// The file comes from scripts/waifu2x_network.py. Each row quantizes the six convolutions on patches of the
/// calibration photographs and prints the peak signal-to-noise ratio of the test photographs' results against the
/// originals, and the SQNR of the results against those of the float network. The seventh layer, a transposed
/// convolution, stays in float32.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "baseq/conv/quantized_conv.h"
#include "baseq/io/checkpoint.h"

namespace {

using at::Tensor;
using Run = std::function<Tensor(size_t layer, const Tensor& x)>;

constexpr int64_t kBorder = 7;  // what the six layers and the last one take off each side

struct Photograph {
  std::string name;
  Tensor low, high;
};

struct Network {
  explicit Network(const baseq::SafetensorsFile& file) {
    for (int i = 1; i <= 6; ++i) {
      const std::string name = "conv" + std::to_string(i);
      weights.push_back(file.tensor(name + ".weight").clone());
      biases.push_back(file.tensor(name + ".bias").clone());
    }
    last_weight = file.tensor("deconv.weight").clone();
    last_bias = file.tensor("deconv.bias").clone();
    const auto photographs = [&](const std::string& use) {
      std::vector<Photograph> result;
      for (const std::string& name : file.names()) {
        if (!name.starts_with(use) || !name.ends_with(".low")) continue;
        const std::string stem = name.substr(0, name.size() - 4);
        result.push_back({stem.substr(use.size()), file.tensor(name).clone(), file.tensor(stem + ".high").clone()});
      }
      return result;
    };
    calibration = photographs("calibration.");
    test = photographs("test.");
  }

  static Tensor activation(const Tensor& y) { return at::leaky_relu(y, 0.1); }
  static Tensor with_border(const Tensor& low) {
    return at::replication_pad2d(low, {kBorder, kBorder, kBorder, kBorder});
  }

  /// `run` computes a convolution.
  Tensor operator()(const Tensor& low, const Run& run) const {
    Tensor x = with_border(low);
    for (size_t i = 0; i < weights.size(); ++i) x = activation(run(i, x));
    return at::conv_transpose2d(x, last_weight, last_bias, 2, 3).clamp(0, 1);
  }
  Tensor real(const Tensor& low) const {
    return (*this)(low, [&](size_t i, const Tensor& x) { return at::conv2d(x, weights[i], biases[i]); });
  }

  /// Patches of the calibration photographs, evenly spread: [patches, 3, size, size].
  Tensor patches(int64_t size, int64_t each) const {
    std::vector<Tensor> result;
    for (const Photograph& photograph : calibration) {
      const Tensor all =
          photograph.low.unfold(2, size, 16).unfold(3, size, 16).permute({0, 2, 3, 1, 4, 5}).flatten(0, 2);
      const Tensor chosen = at::arange(each).mul(all.size(0) - 1).div(each - 1, "floor").to(at::kLong);
      result.push_back(all.index_select(0, chosen));
    }
    return at::cat(result).contiguous();
  }

  std::vector<Tensor> weights, biases;
  Tensor last_weight, last_bias;
  std::vector<Photograph> calibration, test;
};

double decibels(double signal, double error) { return 10 * std::log10(signal / error); }

class Report {
 public:
  explicit Report(const Network& network) : network_(network) {
    for (const Photograph& photograph : network.test) float_.push_back(network.real(photograph.low));
    std::printf("%-34s", "PSNR and SQNR in dB");
    for (const Photograph& photograph : network.test) std::printf(" %14s", photograph.name.c_str());
    std::printf("  %s\n", "seconds to quantize");
    row("bicubic", {}, 0, [&](const Tensor& low) {
      return at::upsample_bicubic2d(low, {2 * low.size(2), 2 * low.size(3)}, false).clamp(0, 1);
    });
    row("float32", {}, 0, [&](const Tensor& low) { return network.real(low); });
  }

  void row(const std::string& name, const std::string& detail, double seconds,
           const std::function<Tensor(const Tensor&)>& run) const {
    std::printf("%-34s", (name + detail).c_str());
    for (size_t i = 0; i < network_.test.size(); ++i) {
      const Tensor y = run(network_.test[i].low);
      const double error = (y - network_.test[i].high).square().mean().item<double>();
      const double from_float = (y - float_[i]).square().mean().item<double>();
      std::printf(" %6.2f", decibels(1, error));
      if (from_float > 0) {
        std::printf(" %7.1f", decibels(float_[i].square().mean().item<double>(), from_float));
      } else {
        std::printf(" %7s", "");
      }
    }
    if (seconds > 0) std::printf("  %.0f", seconds);
    std::printf("\n");
    std::fflush(stdout);
  }

 private:
  const Network& network_;
  std::vector<Tensor> float_;
};

/// One scale for the activations, one an output channel for the weights, by least squared error.
void direct(const Network& network, const Report& report, const Tensor& patches, int64_t bits) {
  std::vector<baseq::QParams> of_x;
  std::vector<Tensor> weights;
  Tensor x = patches;
  const auto spec = [&](size_t layer, baseq::Strategy strategy) {
    return baseq::QuantSpec{.num_bits = layer == 0 ? 8 : bits, .strategy = strategy};
  };
  const auto start = std::chrono::steady_clock::now();
  const Run run = [&](size_t i, const Tensor& in) {
    return at::conv2d(baseq::fake_quantize(in, of_x[i], spec(i, baseq::Strategy::kTensor)), weights[i],
                      network.biases[i]);
  };
  for (size_t i = 0; i < network.weights.size(); ++i) {
    of_x.push_back(baseq::search_qparams(x.contiguous(), spec(i, baseq::Strategy::kTensor), {.norm = 2}));
    const Tensor rows = network.weights[i].flatten(1);
    const auto of_weight = spec(i, baseq::Strategy::kChannel);
    weights.push_back(baseq::fake_quantize(rows, baseq::search_qparams(rows, of_weight, {.norm = 2}), of_weight)
                          .view(network.weights[i].sizes()));
    x = Network::activation(run(i, x));
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  report.row("direct", ", " + std::to_string(bits) + "/" + std::to_string(bits) + ", searched", seconds,
             [&](const Tensor& low) { return network(low, run); });
}

struct Choice {
  const char* name;
  baseq::ConvAlgorithm2d algorithm;
  int64_t weight_bits, activation_bits;
  bool per_frequency = true, search = false;
  int64_t steps = 0;  ///< of learning
};

void tiles(const Network& network, const Report& report, const Tensor& patches, const Choice& choice) {
  std::vector<baseq::ConvLayer> layers;
  for (size_t i = 0; i < network.weights.size(); ++i) {
    // The first layer reads the three channels of the image and keeps 8 bits.
    const auto bits = [&](int64_t chosen) { return i == 0 ? 8 : chosen; };
    const auto strategy = choice.per_frequency ? baseq::Strategy::kChannel : baseq::Strategy::kTensor;
    baseq::ConvQuantization q{.weights = {.num_bits = bits(choice.weight_bits), .strategy = strategy},
                              .activations = {.num_bits = bits(choice.activation_bits), .strategy = strategy}};
    if (choice.search) q.search = baseq::MseSearch{.norm = 2, .num_steps = 40};
    layers.push_back({.weight = network.weights[i],
                      .bias = network.biases[i],
                      .activation = Network::activation,
                      .algorithm = choice.algorithm,
                      .quantization = q});
  }
  const auto start = std::chrono::steady_clock::now();
  std::vector<baseq::IntegerConv2d> convs;
  for (const auto& layer : baseq::calibrate_layers(layers, patches, {.steps = choice.steps, .batch_size = 2})) {
    convs.emplace_back(layer);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  const char* scales = choice.steps > 0        ? ", learned"
                       : choice.search         ? ", searched"
                       : !choice.per_frequency ? ", one scale"
                                               : "";
  const std::string bits = std::to_string(choice.weight_bits) + "/" + std::to_string(choice.activation_bits);
  report.row(choice.name, ", " + bits + scales, seconds,
             [&](const Tensor& low) { return network(low, [&](size_t i, const Tensor& x) { return convs[i](x); }); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: conv_network WAIFU2X.safetensors [THREADS] [LEARNING_STEPS] [BITS...]\n");
    return 2;
  }
  const at::NoGradGuard no_grad;
  at::set_num_threads(argc > 2 ? std::atoi(argv[2]) : 1);
  const int64_t steps = argc > 3 ? std::atoi(argv[3]) : 40;
  const Network network{baseq::SafetensorsFile(argv[1])};
  const Report report(network);
  const Tensor patches = network.patches(62, 8);
  const auto four = baseq::tile_algorithm(baseq::sfc_algorithm(4, 4, 3));
  const auto six = baseq::tile_algorithm(baseq::sfc_algorithm(6, 6, 3));
  const auto winograd = baseq::tile_algorithm(baseq::winograd_algorithm(4, 3));
  std::vector<int64_t> all_bits;
  for (int i = 4; i < argc; ++i) all_bits.push_back(std::atoi(argv[i]));
  if (all_bits.empty()) all_bits = {8, 4};
  for (const int64_t bits : all_bits) {
    direct(network, report, patches, bits);
    std::vector<Choice> choices = {{"Winograd F(4,3)", winograd, bits, bits},
                                   {"SFC-4(4,3)", four, bits, bits, /*per_frequency=*/false},
                                   {"SFC-4(4,3)", four, bits, bits},
                                   {"SFC-6(6,3)", six, bits, bits},
                                   {"SFC-6(6,3)", six, bits, bits, true, /*search=*/true}};
    if (bits < 8) choices.push_back({"SFC-6(6,3)", six, bits, 8});
    if (bits < 8 && steps > 0) choices.push_back({"SFC-6(6,3)", six, bits, 8, true, false, steps});
    if (steps > 0) choices.push_back({"SFC-6(6,3)", six, bits, bits, true, false, steps});
    for (const Choice& choice : choices) tiles(network, report, patches, choice);
  }
}

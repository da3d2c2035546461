/// Error and time of 3x3 convolutions by symbolic Fourier transforms beside LibTorch's, over layers of ResNets.
///
///     convolution [THREADS] [SECONDS] [BATCH...]
///
/// Times are the fastest of the runs that fit into SECONDS for each entry (default 0.2). All tensors are channels-last.
/// quantized conv2d reads and writes 8-bit tensors; the others read and write float32.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "baseq/conv/quantized_conv.h"

namespace {

using at::Tensor;

template <class Fn>
double milliseconds(double seconds, const Fn& f) {
  f();
  double best = 1e300, total = 0;
  for (int run = 0; run < 3 || total < 1e3 * seconds; ++run) {
    const auto start = std::chrono::steady_clock::now();
    f();
    const double time = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    best = std::min(best, time);
    total += time;
  }
  return best;
}

double sqnr(const Tensor& got, const Tensor& expected) {
  return 10 * std::log10(expected.square().sum().item<double>() / (got - expected).square().sum().item<double>());
}

/// Images after a ReLU whose neighbouring pixels correlate by 0.95 along both axes.
Tensor images(int64_t batch, int64_t channels, int64_t size) {
  Tensor x = at::randn({batch, channels, size, size});
  for (const int64_t axis : {3, 2}) {
    for (int64_t i = 1; i < size; ++i) {
      x.select(axis, i).mul_(std::sqrt(1 - 0.95 * 0.95)).add_(x.select(axis, i - 1), 0.95);
    }
  }
  return x.clamp_min(0).contiguous(at::MemoryFormat::ChannelsLast);
}

/// quantized::conv2d with weights packed once: uint8 activations of one scale, int8 weights of one an output channel.
class TorchQuantized {
 public:
  TorchQuantized(const Tensor& x, const Tensor& weight, const Tensor& y) {
    const Tensor scale = weight.abs().amax({1, 2, 3}).div(127.5).to(at::kDouble);
    const Tensor codes = at::quantize_per_channel(weight, scale, at::zeros({weight.size(0)}, at::kLong), 0, at::kQInt8);
    const std::vector<int64_t> one = {1, 1};
    torch::jit::Stack stack;
    torch::jit::push(stack, codes, at::IValue(), one, one, one, 1);
    c10::Dispatcher::singleton().findSchemaOrThrow("quantized::conv2d_prepack", "").callBoxed(stack);
    packed_ = stack.back();
    input_ = at::quantize_per_tensor(x, x.max().item<double>() / 255, 0, at::kQUInt8);
    const double low = y.min().item<double>(), high = y.max().item<double>();
    out_scale_ = (high - low) / 255;
    out_zero_ = static_cast<int64_t>(std::lround(-low / out_scale_));
  }
  Tensor operator()() const {
    torch::jit::Stack stack;
    torch::jit::push(stack, input_, packed_, out_scale_, out_zero_);
    conv_.callBoxed(stack);
    return stack.back().toTensor();
  }

 private:
  c10::OperatorHandle conv_ = c10::Dispatcher::singleton().findSchemaOrThrow("quantized::conv2d", "new");
  at::IValue packed_;
  Tensor input_;
  double out_scale_ = 1;
  int64_t out_zero_ = 0;
};

/// Fake-quantized input of one scale and weight of one an output channel, the product in floating point.
Tensor direct_quantized(const Tensor& x, const Tensor& weight, int64_t bits) {
  const baseq::QuantSpec of_x{.num_bits = bits, .strategy = baseq::Strategy::kTensor}, of_weight{.num_bits = bits};
  const Tensor rows = weight.flatten(1);
  return at::conv2d(baseq::fake_quantize(x, baseq::compute_qparams(x, of_x), of_x),
                    baseq::fake_quantize(rows, baseq::compute_qparams(rows, of_weight), of_weight).view(weight.sizes()),
                    {}, 1, 1);
}

struct Candidate {
  const char* name;
  baseq::ConvAlgorithm2d algorithm;
};

std::vector<Candidate> candidates() {
  using baseq::ConvForm;
  using baseq::sfc_algorithm;
  using baseq::tile_algorithm;
  return {
      {"SFC-4(4,3)", tile_algorithm(sfc_algorithm(4, 4, 3))},
      {"SFC-6(6,3)", tile_algorithm(sfc_algorithm(6, 6, 3))},
      {"SFC-6(7,3)", tile_algorithm(sfc_algorithm(6, 7, 3))},
      {"SFC-6(7,3) symbolic", tile_algorithm(sfc_algorithm(6, 7, 3), ConvForm::kSymbolic)},
      {"Winograd F(4,3)", tile_algorithm(baseq::winograd_algorithm(4, 3))},
  };
}

baseq::ConvQuantization of_bits(int64_t bits, bool per_frequency, bool search) {
  const auto strategy = per_frequency ? baseq::Strategy::kChannel : baseq::Strategy::kTensor;
  baseq::ConvQuantization q{.weights = {.num_bits = bits, .strategy = strategy},
                            .activations = {.num_bits = bits, .strategy = strategy}};
  if (search) q.search = baseq::MseSearch{.norm = 2};
  return q;
}

void print_errors() {
  const Tensor x = images(2, 64, 56), weight = at::randn({64, 64, 3, 3}), y = at::conv2d(x, weight, {}, 1, 1);
  std::printf(
      "SQNR in dB, 64 channels of 56 x 56, 2 images. tensor: one scale; frequency: [T,T] and [OC,T,T];\n"
      "searched: the latter by least squared error\n");
  std::printf("%-20s %8s %10s | %s\n", "", "products", "an output", "bits: tensor frequency searched ...");
  std::printf("%-20s %8s %10.3f |", "direct", "", 9.0);
  for (const int64_t bits : {8, 6, 4}) {
    std::printf(" %d: %15.1f         ", static_cast<int>(bits), sqnr(direct_quantized(x, weight, bits), y));
  }
  std::printf("\n");
  for (const auto& [name, algorithm] : candidates()) {
    const auto outputs = static_cast<double>(algorithm.rows.outputs * algorithm.cols.outputs);
    std::printf("%-20s %8d %10.3f |", name, static_cast<int>(algorithm.num_products()),
                static_cast<double>(algorithm.num_products()) / outputs);
    for (const int64_t bits : {8, 6, 4}) {
      std::printf(" %d:", static_cast<int>(bits));
      for (const auto& [per_frequency, search] : {std::pair(false, false), {true, false}, {true, true}}) {
        const auto layer = baseq::quantize_conv2d(weight, {}, x, algorithm, baseq::Padding::all(1),
                                                  of_bits(bits, per_frequency, search));
        std::printf(" %6.1f", sqnr(baseq::IntegerConv2d(layer)(x), y));
      }
      std::printf("  ");
    }
    std::printf("\n");
  }
}

void print_times(int64_t batch, int64_t channels, int64_t size, double seconds) {
  const Tensor x = images(batch, channels, size), raw = at::randn({channels, channels, 3, 3});
  const Tensor weight = raw.contiguous(at::MemoryFormat::ChannelsLast), y = at::conv2d(x, weight, {}, 1, 1);
  const double real = std::min(milliseconds(seconds, [&] { at::conv2d(x, weight, {}, 1, 1); }),
                               milliseconds(seconds, [&, c = x.contiguous()] { at::conv2d(c, raw, {}, 1, 1); }));
  const TorchQuantized quantized(x, weight, y);
  const double eight = milliseconds(seconds, quantized);
  const auto label =
      std::to_string(batch) + "x" + std::to_string(channels) + "x" + std::to_string(size) + "x" + std::to_string(size);
  const double products = 9.0 * static_cast<double>(channels * y.numel());
  std::printf("%-14s %8.3f %8.3f (%4.1f dB)", label.c_str(), real, eight, sqnr(quantized().dequantize(), y));
  for (const auto& [name, algorithm] : candidates()) {
    if (algorithm.rows.points == 0) continue;
    const baseq::IntegerConv2d conv(
        baseq::quantize_conv2d(raw, {}, x, algorithm, baseq::Padding::all(1), of_bits(8, true, false)));
    const double time = milliseconds(seconds, [&] { conv(x); });
    const auto tiles_of = [](int64_t extent, int64_t outputs) { return (extent + outputs - 1) / outputs; };
    const int64_t tiles = batch * tiles_of(size, algorithm.rows.outputs) * tiles_of(size, algorithm.cols.outputs);
    const double fewer = products / static_cast<double>(tiles * algorithm.num_products() * channels * channels);
    std::printf(" | %7.3f %4.1f dB %5.2f %5.2f %5.2f", time, sqnr(conv(x), y), fewer, real / time, eight / time);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  const at::NoGradGuard no_grad;
  at::set_num_threads(argc > 1 ? std::atoi(argv[1]) : 1);
  const double seconds = argc > 2 ? std::atof(argv[2]) : 0.2;
  std::vector<int64_t> batches;
  for (int i = 3; i < argc; ++i) batches.push_back(std::atoi(argv[i]));
  if (batches.empty()) batches = {1, 8};
  at::manual_seed(1);
  print_errors();
  std::printf(
      "\n%d threads; milliseconds of LibTorch's conv2d in float32 and quantized, then for each algorithm\n"
      "milliseconds, SQNR, times fewer multiplications, times faster than float32, than quantized\n",
      at::get_num_threads());
  std::printf("%-14s %8s %18s", "batch x layer", "float32", "quantized");
  for (const auto& [name, algorithm] : candidates()) {
    if (algorithm.rows.points != 0) std::printf(" | %-34s", name);
  }
  std::printf("\n");
  for (const int64_t batch : batches) {
    for (const auto& [channels, size] :
         std::vector<std::pair<int64_t, int64_t>>{{16, 56}, {32, 56}, {64, 56}, {128, 28}, {256, 14}, {512, 7}}) {
      print_times(batch, channels, size, seconds);
    }
  }
}

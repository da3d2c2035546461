// Quantizes a tensor and builds a recipe with nothing but what an installed baseq offers.
#include <ATen/ATen.h>
#include <baseq/pipeline/recipe.h>
#include <baseq/quant/pack.h>
#include <baseq/quant/quantize.h>

#include <cstdio>

int main() {
  const at::Tensor weight = at::linspace(-1, 1, 64 * 128).view({64, 128});
  const baseq::QuantSpec spec{.num_bits = 4, .strategy = baseq::Strategy::kGroup, .group_size = 32};
  const baseq::QParams qparams = baseq::compute_qparams(weight, spec);
  const at::Tensor codes = baseq::quantize(weight, qparams, spec);
  const at::Tensor packed = baseq::pack_to_int32(codes, spec.num_bits);
  const float error = (baseq::dequantize(codes, qparams, spec) - weight).abs().max().item<float>();
  const float step = qparams.scale.max().item<float>();
  std::printf("%lld words, largest error %.4f of a step\n", static_cast<long long>(packed.numel()), error / step);
  baseq::Recipe recipe{.name = "consumer"};
  recipe.grids.weights = spec;
  recipe.passes[0].steps = {baseq::RoundStep{}};
  recipe.validate();
  const bool reads_by_name = baseq::Recipe::read("gptq-w4a16-g64").needs_calibration();
  return reads_by_name && error <= step * 0.5001F && packed.numel() == 64 * 128 / 8 && !recipe.needs_calibration() ? 0
                                                                                                                   : 1;
}

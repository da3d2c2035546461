// Quantizes one linear layer with GPTQ, then a checkpoint: quantize_example MODEL OUTPUT
#include <ATen/ATen.h>

#include <cstdio>

#include "baseq/pipeline/quantize_checkpoint.h"
#include "baseq/quant/gptq.h"

int main(int argc, char** argv) {
  const at::Tensor weight = at::randn({256, 512}), inputs = at::randn({2048, 512});
  baseq::Hessian hessian(512);
  hessian.add(inputs);
  const baseq::QuantSpec grid{.num_bits = 4, .strategy = baseq::Strategy::kGroup, .group_size = 64};
  const baseq::GptqResult layer = baseq::gptq(weight, hessian.mean(), grid);
  std::printf("linear: relative output error %.5f\n", layer.relative_error);
  if (argc != 3) return 0;
  const baseq::Checkpoint checkpoint(argv[1]);
  baseq::Recipe recipe{.name = "w8a16"};
  recipe.grids.weights = baseq::QuantSpec{.num_bits = 8};
  recipe.passes[0].steps = {baseq::RoundStep{}};
  baseq::quantize_checkpoint(checkpoint, recipe, /*windows=*/{}, argv[2]);
  std::printf("checkpoint: %s\n", argv[2]);
}

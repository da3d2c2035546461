// Quantizes one linear layer with GPTQ, then a checkpoint: quantize_example MODEL OUTPUT
#include <baseq/baseq.h>

#include <cstdio>

int main(int argc, char** argv) {
  const at::Tensor weight = at::randn({256, 512}), inputs = at::randn({2048, 512});
  const baseq::GptqResult layer = baseq::gptq(weight, baseq::second_moments(inputs),
                                              {.num_bits = 4, .strategy = baseq::Strategy::kGroup, .group_size = 64});
  std::printf("linear: relative output error %.5f\n", layer.relative_error);
  if (argc != 3) return 0;
  baseq::Job job{.model = argv[1], .recipe = {.name = "w8a16"}, .output = argv[2]};
  job.recipe.grids.weights = baseq::QuantSpec{.num_bits = 8};
  job.recipe.passes[0].steps = {baseq::RoundStep{}};
  baseq::quantize(job);
  std::printf("checkpoint: %s\n", argv[2]);
}

// What a user of the library writes: one linear, a checkpoint with progress, the quantized model's logits.
//     consumer MODEL CALIBRATION OUTPUT
#include <baseq/baseq.h>

#include <cstdio>
#include <iostream>

at::Tensor rotated_weight(const at::Tensor& weight, const at::Tensor& inputs);  // alone.cpp
int64_t structs();                                                              // structs.cpp

int main(int argc, char** argv) {
  if (argc != 4 || structs() == 0) return 2;
  // One linear.
  const at::Tensor w = at::randn({256, 512}), x = at::randn({2048, 512});
  const auto q =
      baseq::gptq(w, baseq::second_moments(x), {.num_bits = 4, .strategy = baseq::Strategy::kGroup, .group_size = 64});
  const at::Tensor packed = baseq::pack_to_int32(q.weight.codes, q.weight.spec.num_bits);
  if (!(q.relative_error < 0.02) || packed.numel() != 256 * 512 / 8) return 1;
  const at::Tensor y = at::mv(rotated_weight(w, x), baseq::hadamard_transform(x[0])), exact = at::mv(w, x[0]);
  if (!((y - exact).norm().item<float>() < 0.2 * exact.norm().item<float>())) return 1;

  // A checkpoint, with progress of its own.
  baseq::Job job{.model = argv[1], .recipe = baseq::Recipe::read("gptq-w4a16-g64"), .output = argv[3]};
  job.recipe.grids.weights->group_size = 32;  // 64 does not divide the sizes of a tiny model
  job.recipe.num_samples = 4;
  job.recipe.seq_len = 64;
  job.windows = baseq::calibration_windows(argv[2], job);
  int num_blocks = 0;
  job.progress = baseq::on_events([&](const baseq::BlockFinished&) { ++num_blocks; },
                                  [](const baseq::Warning& warning) { std::puts(warning.message.c_str()); });
  for (const auto& problem : baseq::plan(job).problems) return std::puts(problem.c_str());
  baseq::quantize(job);
  if (num_blocks == 0) return 1;

  // The quantized model's forward, resident.
  const baseq::Decoder decoder = baseq::Model(baseq::open_model(argv[3])).load();
  const at::Tensor ids = baseq::token_ids(baseq::open_tokenizer(argv[3]), "The quick brown fox");
  std::cout << decoder.logits(ids).argmax(-1) << "\n";

  // Errors are sentences.
  try {
    baseq::quantize(job);
  } catch (const c10::Error& error) {
    std::puts(error.what_without_backtrace());
    return 0;
  }
  return 1;  // the output exists
}

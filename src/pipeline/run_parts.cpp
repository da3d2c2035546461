#include "run_parts.h"

#include <ATen/ATen.h>

#include "baseq/tokenizer/token_windows.h"
#include "grid_overrides.h"
#include "model/named_tensors.h"
#include "pipeline/divided_reading.h"
#include "pipeline/divided_run.h"
#include "run_description.h"

namespace baseq {
namespace {

BlockQuantizer::Options with_job(BlockQuantizer::Options options, const Job& job, const Shards& shards,
                                 const DevicePlan& plan) {
  options.compute = at::TensorOptions().dtype(at::kFloat).device(job.options.device);
  options.storage = {.dtype = job.recipe.activations_dtype,
                     .directory = job.options.activations_directory,
                     .device = plan.streams_on_device ? job.options.device : at::Device(at::kCPU)};
  options.pass.shards = shards;
  options.seed = job.options.seed;
  return options;
}

at::ScalarType unquantized_dtype(const Model& model, const Recipe& recipe) {
  TORCH_CHECK(!model.quantization(), model.checkpoint().path().string(),
              ": is already quantized; quantize the original checkpoint instead");
  return recipe.dtype.value_or(model.tensors().info("model.embed_tokens.weight").dtype);
}

}  // namespace

void check_input(const Job& job) {
  job.recipe.validate();
  const Tensor& windows = job.windows;
  TORCH_CHECK(!windows.defined() || (windows.dim() == 2 && at::isIntegralType(windows.scalar_type(), false)),
              "quantize: windows are ", windows.sizes(), " of ", windows.dtype(),
              ", expected token ids [num_windows, seq_len]");
}

RunParts::RunParts(const Job& job, BlockQuantizer::Options options)
    : shards(shards_of(job)),
      recipe(job.recipe),
      // The residual rotation is merged in float64; otherwise weights are loaded as float32.
      stored(stored_model(job)),
      model(read_together(stored, job.options.communicator),
            {.dtype = recipe.rotates_residual() ? at::kDouble : at::kFloat, .device = job.options.device}),
      dtype(unquantized_dtype(model, recipe)),
      device(plan_device(job, model.config(), shape_of(job, model.checkpoint()))),
      blocks(model, recipe, job.windows, with_job(std::move(options), job, shards, device)),
      tables(model, recipe, blocks.residual(), dtype) {
  const Tensor& windows = job.windows;
  TORCH_CHECK(windows.defined() || !recipe.needs_calibration(), needs_windows(recipe));
  if (windows.defined()) check_token_ids(windows, model.config().vocab_size, "quantize: calibration windows");
  recipe.grids = blocks.grids();  // for this model
  const std::vector<std::string> unmatched = unmatched_patterns(recipe.grids, model.config());
  TORCH_CHECK(unmatched.empty(), unmatched.front());
  if (windows.defined() && recipe.needs_calibration()) {  // what the checkpoint says was used
    recipe.num_samples = windows.size(0);
    recipe.seq_len = windows.size(1);
  }
}

}  // namespace baseq

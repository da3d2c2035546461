#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <system_error>

#include "baseq/pipeline/job.h"
#include "baseq/transform/hadamard.h"
#include "block_windows.h"
#include "device_plan.h"
#include "finite_weights.h"
#include "grid_overrides.h"
#include "io/disk_room.h"
#include "io/machine_limits.h"
#include "io/side_files.h"
#include "io/units.h"
#include "model/named_tensors.h"
#include "model/unused_tensors.h"
#include "pipeline/divided_run.h"
#include "pipeline/footprint.h"
#include "quant/bfloat16_product.h"
#include "quant/instruction_set.h"
#include "run_description.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxNamedShapes = 10;

std::string text_of(const c10::Error& error) { return error.what_without_backtrace(); }

void check_shapes(const Model& model, RunPlan& plan) {
  size_t found = 0;
  for_each_tensor(model.config(), [&](const std::string& name, at::IntArrayRef shape) {
    if (!model.tensors().contains(name)) return;  // the model's own list names what is missing
    std::string problem;
    try {
      const TensorInfo info = model.tensors().info(name);
      if (info.shape == shape) return;
      problem = fmt::format("{}: shape is {} but config.json says {}", model.tensors().stored_name(name),
                            c10::str(at::IntArrayRef(info.shape)), c10::str(shape));
    } catch (const c10::Error& error) {
      problem = text_of(error);
    }
    if (!plan.problems.empty() && plan.problems.back() == problem) return;  // the parts of a fused tensor in turn
    if (++found <= kMaxNamedShapes) plan.problems.push_back(problem);
  });
  if (found > kMaxNamedShapes) {
    plan.problems.push_back(fmt::format("and {} more tensors of another shape", found - kMaxNamedShapes));
  }
}

/// What the quantized model would lack.
void check_unused(const Model& model, RunPlan& plan) {
  for (const Unused& unused : find_unused(model)) {
    (unused.harmless ? plan.warnings : plan.problems).push_back(unused.message());
  }
}

/// Says what the output gets of the files next to the weights; returns their bytes.
int64_t check_side_files(const Checkpoint& checkpoint, RunPlan& plan) {
  try {
    const SideFiles files = find_side_files(checkpoint.path(), checkpoint.config());
    plan.problems.insert(plan.problems.end(), files.problems.begin(), files.problems.end());
    if (!files.left_out.empty()) plan.warnings.push_back(files.warning());
    return files.num_bytes();
  } catch (const c10::Error& error) {
    plan.problems.push_back(text_of(error));
    return 0;
  }
}

/// Where a recipe gives the grid of a linear.
std::string grid_path(const Grids& grids, const std::string& linear) {
  const GridOverride* found = grids.override_of(linear);
  return found ? fmt::format("grids.overrides[{}].weights", found - grids.overrides.data()) : "grids.weights";
}

void check_groups(const ModelConfig& config, const Grids& grids, RunPlan& plan) {
  // Grid and input size -> its group size and who reads so many.
  std::map<std::pair<std::string, int64_t>, std::pair<int64_t, std::vector<std::string>>> wrong;
  for (int64_t block = 0; block < config.num_hidden_layers; ++block) {
    for (const LinearShape& linear : linear_shapes(config)) {
      const std::string name = layer_prefix(block) + linear.name;
      const std::optional<QuantSpec>& grid = grids.weights_of(name);
      if (!grid || grid->strategy != Strategy::kGroup || linear.in_features % grid->group_size == 0) continue;
      auto& [group_size, readers] = wrong[{grid_path(grids, name), linear.in_features}];
      group_size = grid->group_size;
      if (std::ranges::find(readers, linear.name) == readers.end()) readers.emplace_back(linear.name);
    }
  }
  for (const auto& [where, found] : wrong) {
    plan.problems.push_back(fmt::format("{}.group_size: {} does not divide {}, the input size of {}", where.first,
                                        found.first, where.second, fmt::join(found.second, ", ")));
  }
}

/// @param key how the step names its sites
void check_hadamards(const ModelConfig& config, const TransformStep& step, const std::string& key, RunPlan& plan) {
  if (step.kind != TransformStep::Kind::kHadamard) return;
  for (const Site site : step.at) {
    const SiteShape shape = site_shape(site, config);
    const int64_t size = shape.features / shape.blocks, block = hadamard_block_size(size);
    if (block == size) continue;
    const std::string what = fmt::format("{}: \"{}\": size {} has no Hadamard matrix", key, site_info(site).name, size);
    if (block == 1) {
      plan.problems.push_back(what + " nor an even divisor; leave this transform out");
    } else {
      plan.warnings.push_back(fmt::format("{}; it is rotated in blocks of {}", what, block));
    }
  }
}

/// @param key as above
void check_blocks(const ModelConfig& config, const TransformStep& step, const std::string& key, RunPlan& plan) {
  if (step.block_size == 0) return;
  for (const Site site : step.at) {
    const int64_t features = site_shape(site, config).features;
    if (features % step.block_size == 0) continue;
    plan.problems.push_back(fmt::format("{}: \"{}\": blocks of {} do not fill its {} features", key,
                                        site_info(site).name, step.block_size, features));
  }
}

/// Calls visit(step, path) for every step of one type.
template <class Type, class Visit>
void for_each_step(const Recipe& recipe, const Visit& visit) {
  for (size_t pass = 0; pass < recipe.passes.size(); ++pass) {
    const std::vector<Step>& steps = recipe.passes[pass].steps;
    for (size_t i = 0; i < steps.size(); ++i) {
      if (const auto* step = std::get_if<Type>(&steps[i])) visit(*step, recipe.step_path(pass, i));
    }
  }
}

/// Grids and transforms against the sizes of the model.
void check_recipe(const ModelConfig& config, const Recipe& recipe, RunPlan& plan) {
  check_groups(config, recipe.grids, plan);
  const std::pair<const char*, const std::optional<QuantSpec>*> tables[] = {{"head", &recipe.grids.head},
                                                                            {"embedding", &recipe.grids.embedding}};
  for (const auto& [key, grid] : tables) {
    if (!*grid || (*grid)->strategy != Strategy::kGroup || config.hidden_size % (*grid)->group_size == 0) continue;
    plan.problems.push_back(fmt::format("grids.{}.group_size: {} does not divide {}, the hidden size", key,
                                        (*grid)->group_size, config.hidden_size));
  }
  for_each_step<TransformStep>(recipe, [&](const TransformStep& step, const std::string& path) {
    check_hadamards(config, step, path + ".at", plan);
    check_blocks(config, step, path + ".at", plan);
  });
  for_each_step<ChooseStep>(recipe, [&](const ChooseStep& choice, const std::string& path) {
    for (const std::vector<TransformStep>& chain : choice.from) {
      for (TransformStep step : chain) {
        step.at = choice.at;
        check_hadamards(config, step, path + ".at", plan);
        check_blocks(config, step, path + ".at", plan);
      }
    }
  });
}

void check_windows(const Job& job, const ModelConfig& config, const RunShape& shape, RunPlan& plan) {
  const Tensor& windows = job.windows;
  if (windows.defined() && job.recipe.needs_calibration() &&
      (shape.num_windows != job.recipe.num_samples || shape.seq_len != job.recipe.seq_len)) {
    plan.warnings.push_back(fmt::format("calibration: {} windows of {} tokens, but the recipe asks for {} of {}",
                                        shape.num_windows, shape.seq_len, job.recipe.num_samples, job.recipe.seq_len));
  }
  if (windows.defined() && windows.numel() > 0) {
    const auto low = windows.min().item<int64_t>(), high = windows.max().item<int64_t>();
    if (low < 0 || high >= config.vocab_size) {
      plan.problems.push_back(fmt::format("calibration: token ids run from {} to {} but the model knows 0 to {}", low,
                                          high, config.vocab_size - 1));
    }
  }
  if (shape.num_windows > 0 && shape.seq_len > config.max_position_embeddings && config.max_position_embeddings > 0) {
    plan.warnings.push_back(fmt::format("calibration: windows of {} tokens, but the model was made for {}",
                                        shape.seq_len, config.max_position_embeddings));
  }
}

void check_products(const Job& job, RunPlan& plan) {
  if (!job.options.device.is_cpu()) return;
  if (job.recipe.matmul_precision == MatmulPrecision::kHigh) {
    plan.warnings.push_back(
        "calibration.matmul_precision: \"high\" is float32 on the CPU; only \"medium\" differs there");
  } else if (job.recipe.matmul_precision == MatmulPrecision::kMedium && !has_bfloat16_products()) {
    plan.warnings.push_back(
        "calibration.matmul_precision: this processor, or this LibTorch, has no products of bfloat16; "
        "those of the calibration passes are float32");
  }
  for_each_step<LearnStep>(job.recipe, [&](const LearnStep& step, const std::string& path) {
    if (!step.learns() || multiplies(step.products)) return;
    plan.warnings.push_back(
        fmt::format("{}.products: this processor has no products of {}; learning with \"float32\" is faster here, to "
                    "slightly other results",
                    path, step.products == at::kHalf ? "float16" : "bfloat16"));
  });
}

/// The tensors of a model: missing, of another shape, not finite, not used.
void check_model(const Checkpoint& checkpoint, RunPlan& plan) {
  try {
    const Model model(checkpoint);
    if (model.quantization()) {
      plan.problems.push_back(checkpoint.path().string() +
                              ": is already quantized; quantize the original checkpoint instead");
      return;
    }
    check_shapes(model, plan);
    check_unused(model, plan);
    for (std::string& problem : weights_not_finite(checkpoint, model)) plan.problems.push_back(std::move(problem));
  } catch (const c10::Error& error) {
    plan.problems.push_back(text_of(error));
  }
}

int64_t bytes_in(const fs::path& directory) {
  int64_t bytes = 0;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error), end; !error && entry != end; entry.increment(error)) {
    std::error_code ignored;
    if (entry->is_regular_file(ignored)) bytes += static_cast<int64_t>(entry->file_size(ignored));
  }
  return bytes;
}

ModelConfig config_of(const Checkpoint& checkpoint) {
  return ModelConfig::from_json(checkpoint.config(), (checkpoint.path() / "config.json").string());
}

/// Without looking at config.json, which may be wrong.
Checkpoint checkpoint_of(const Job& job) {
  if (const auto* path = std::get_if<fs::path>(&job.model)) return Checkpoint(*path);
  return std::get<StoredModel>(job.model).tensors;
}

/// Output, work directory and streams, in this order.
std::vector<Footprint::Part> disk_needs(const Job& job, const ModelConfig& config, const RunShape& shape,
                                        int64_t side_files) {
  const Recipe& recipe = job.recipe;
  const QuantizeOptions& options = job.options;
  const OutputBytes written = output_bytes(config, recipe, shape.checkpoint_dtype);
  std::vector<Footprint::Part> disk = {
      {fs::absolute(job.output).parent_path().string(), written.blocks + written.surroundings + side_files}};
  const int64_t stream = shape.num_windows * shape.seq_len * config.hidden_size *
                         static_cast<int64_t>(c10::elementSize(recipe.activations_dtype));
  if (!options.work_directory.empty()) {
    // The streams of a block are written before those of an earlier one go.
    const int64_t kept = written.blocks + 2 * 2 * stream + stage_bytes(config, recipe);
    disk.push_back({options.work_directory.string(), std::max<int64_t>(0, kept - bytes_in(options.work_directory))});
  }
  if (shape.activations_on_disk && stream > 0) {
    disk.push_back({options.activations_directory.string(), num_streams(recipe) * stream});
  }
  return disk;
}

}  // namespace

RunPlan plan(const Job& job) {
  RunPlan plan;
  std::optional<Checkpoint> opened;
  ModelConfig config;
  try {
    job.recipe.validate();
    plan.problems = find_obstacles(job);
    opened = checkpoint_of(job);
    config = config_of(*opened);
    for (std::string& problem : unmatched_patterns(job.recipe.grids, config))
      plan.problems.push_back(std::move(problem));
  } catch (const c10::Error& error) {  // nothing that follows from it means anything
    plan.problems.push_back(text_of(error));
    return plan;
  }
  const Checkpoint& checkpoint = *opened;
  RunShape shape = shape_of(job, checkpoint);
  if (std::optional<std::string> problem = not_divisible(job)) plan.problems.push_back(std::move(*problem));
  if (!job.windows.defined() && job.recipe.needs_calibration()) plan.problems.push_back(needs_windows(job.recipe));
  check_model(checkpoint, plan);
  check_recipe(config, job.recipe, plan);
  check_windows(job, config, shape, plan);
  check_products(job, plan);

  plan.num_blocks = config.num_hidden_layers;
  const DevicePlan device = plan_device(job, config, shape);
  if (device.problem) plan.problems.push_back(*device.problem);
  plan.device_memory = device.memory;
  shape.streams_on_device = device.streams_on_device;
  plan.memory = quantization_memory(config, job.recipe, shape);
  plan.disk = disk_needs(job, config, shape, check_side_files(checkpoint, plan));
  std::vector<DiskNeed> needs;
  for (const Footprint::Part& part : plan.disk) needs.push_back({part.what, part.bytes});
  for (std::string& problem : find_disk_problems(needs)) plan.problems.push_back(std::move(problem));
  const std::optional<int64_t> available = available_memory();
  if (available && plan.memory.bytes() > *available) {
    plan.warnings.push_back(
        fmt::format("memory: about {} needed, {} available; a `memory` budget finds a way with less",
                    format_bytes(plan.memory.bytes()), format_bytes(*available)));
  }
  return plan;
}

MemoryFit fit_memory(const Job& job, int64_t budget) {
  job.recipe.validate();
  const Checkpoint checkpoint = checkpoint_of(job);
  const ModelConfig config = config_of(checkpoint);
  const RunShape shape = shape_of(job, checkpoint);
  Job in_one_process = job;
  in_one_process.options.communicator = {};
  const auto choice = [&](RunShape with, int64_t tokens_per_batch, bool on_disk) {
    with.tokens_per_batch = tokens_per_batch;
    with.activations_on_disk = on_disk;
    with.streams_on_device = !on_disk && plan_device(job, config, with).streams_on_device;
    return MemoryChoice{tokens_per_batch, on_disk, quantization_memory(config, job.recipe, with).bytes()};
  };
  const auto fits = [&](const MemoryChoice& one) { return one.bytes <= budget; };
  const auto taken = [&](const MemoryChoice& one) { return fits(one) ? std::optional(one) : std::nullopt; };
  const MemoryChoice roomy = choice(shape, kTokensPerBatch, false);
  if (shape.num_windows == 0) return {.choice = taken(roomy), .smallest = roomy};
  // The size of a batch changes the result, which must not depend on the number of processes.
  const RunShape alone = shape_of(in_one_process, checkpoint);
  int64_t tokens = kTokensPerBatch;  // a batch is at least one window
  while (tokens > std::max<int64_t>(1, shape.seq_len) && !fits(choice(alone, tokens, true))) tokens /= 2;
  const MemoryChoice on_disk = choice(shape, tokens, true);
  return {.choice = taken(tokens == kTokensPerBatch && fits(roomy) ? roomy : on_disk), .smallest = on_disk};
}

}  // namespace baseq

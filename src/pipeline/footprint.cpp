#include "pipeline/footprint.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "baseq/model/model.h"
#include "block_windows.h"
#include "head_loss.h"
#include "model/quantized_linear.h"
#include "starts.h"
#include "steps.h"
#include "transform_parameters.h"
#include "turns.h"

namespace baseq {
namespace {

using StepKind = TransformStep::Kind;

constexpr int64_t kFloatBytes = 4, kDoubleBytes = 8, kLongBytes = 8;
/// What a tensor takes in the header of its file, what the log says of a block, and the files that every output has.
constexpr int64_t kHeaderBytes = 128, kLogBytes = 4096, kFilesBytes = 40 << 10;
/// Copies of a matrix while a step learns its rotation: the leaf with its gradient and the optimizer's two moments, the
/// matrices of the Cayley map, and the gradients of those.
constexpr int64_t kLearnedCopies = 12;
/// Values of a weight whose clips are searched at a time by tensor operations, and tensors of that size.
constexpr int64_t kSearchChunk = int64_t{1} << 24, kSearchCopies = 8;
/// Tensors of the size of its input that a quant point takes by tensor operations.
constexpr int64_t kPointCopies = 8;

int64_t block_values(const ModelConfig& config) {
  int64_t values = 0;
  for (const LinearShape& linear : linear_shapes(config)) values += linear.out_features * linear.in_features;
  return values;
}

int64_t size_of(at::ScalarType dtype) { return static_cast<int64_t>(c10::elementSize(dtype)); }

bool everywhere(const SiteInfo&) { return true; }
/// The weights around such a site take no matrix: it stays, and is multiplied by at run time.
bool is_online(const SiteInfo& info) { return info.online; }

/// Whether a step learns a parameter of that kind, such as "matrix".
bool learns(const LearnStep& step, std::string_view what) {
  return std::ranges::any_of(step.rates,
                             [&](const auto& rate) { return rate.first.ends_with("." + std::string(what)); });
}

/// Values of the matrices that a step places at a site of a block.
/// @param inverted whether a step learns inverses that are no transposes
int64_t matrix_values_at(const ModelConfig& config, const TransformStep& step, Site site, bool inverted) {
  const SiteShape shape = site_shape(site, config);
  const int64_t width = step.block_size > 0 ? step.block_size : shape.width();
  const int64_t dense = (site == Site::kQueryKey ? width : shape.features) * width;
  if (step.kind == StepKind::kMatrix) return dense * (inverted ? 2 : 1);
  if (step.kind == StepKind::kBalance && site == Site::kValue) return 2 * dense;
  if (step.kind == StepKind::kPermutation) return shape.features * kLongBytes / kFloatBytes;
  if (step.kind != StepKind::kKronecker) return 0;
  const auto [left, right] = kronecker_sizes(site, config);
  return (left * left + right * right) * (inverted ? 2 : 1);
}

/// Values of the matrices that the steps of a recipe place at those sites of a block, with their inverses.
int64_t matrix_values(const ModelConfig& config, const Recipe& recipe, bool (*counts)(const SiteInfo&)) {
  const bool inverted = std::ranges::any_of(recipe.steps_of<LearnStep>(), [](const LearnStep* step) {
    return learns(*step, "svd") || learns(*step, "band") || learns(*step, "kronecker");
  });
  int64_t values = 0;
  for (const TransformStep& step : recipe.transforms()) {
    for (const Site site : step.at) {
      if (counts(site_info(site))) values += matrix_values_at(config, step, site, inverted);
    }
  }
  return values;
}

/// While a layer is rotated: all of it in float64, and one linear at a time besides.
int64_t merging_bytes(const ModelConfig& config, const Recipe& recipe) {
  const std::vector<TransformStep> steps = recipe.transforms();
  const bool wide =
      std::ranges::any_of(steps, [](const TransformStep& step) { return step.kind == StepKind::kHadamard; });
  if (!wide) return block_values(config) * kFloatBytes * (steps.empty() ? 1 : 2);
  return block_values(config) * kDoubleBytes + config.hidden_size * config.intermediate_size * kDoubleBytes;
}

const LowRankOptions* low_rank_of(const Recipe& recipe) {
  const RoundStep* round = recipe.round_step();
  return round && round->low_rank ? &*round->low_rank : nullptr;
}

/// Values of lora_A and lora_B together, 0 without a low-rank correction.
int64_t low_rank_values(const Recipe& recipe, const LinearShape& linear) {
  const LowRankOptions* low_rank = low_rank_of(recipe);
  if (!low_rank) return 0;
  const int64_t rank = std::min({low_rank->rank, linear.out_features, linear.in_features});
  return rank * (linear.out_features + linear.in_features);
}

/// While one linear is rounded: the block in float32, its codes, and what GPTQ or the low-rank correction holds of the
/// largest input.
int64_t rounding_bytes(const ModelConfig& config, const Recipe& recipe, const RunShape& shape) {
  const RoundStep* round = recipe.round_step();
  if (!round) return 0;
  const bool gptq = round->method == RoundStep::Method::kGptq;
  const int64_t values = block_values(config);
  int64_t block = values * (kFloatBytes + 1);
  if (gptq && round->compensate_streams) block += values * kFloatBytes;
  int64_t largest = 0;
  for (const LinearShape& linear : linear_shapes(config)) {
    const int64_t n = linear.in_features, weight = linear.out_features * n;
    int64_t bytes = weight * (2 * kFloatBytes + 1);
    if (recipe.rounding_needs_moments()) {
      const int64_t square = n * n, cross = round->compensate_streams ? square * kDoubleBytes : 0;
      // The sums and one product in float32; then the Hessian, its factor and the feedback, or the cross term's
      // products.
      const int64_t collecting = square * (shape.num_sums * kDoubleBytes + kFloatBytes) + (shape.num_sums + 1) * cross +
                                 forward_bytes(config, std::max(shape.tokens_per_batch, shape.seq_len));
      const int64_t solving =
          square * 2 * kDoubleBytes + std::max(square * kFloatBytes, 3 * cross) + cross + weight * 2 * kFloatBytes;
      // Of few tokens these themselves are held and, twice as large, their factor.
      const int64_t tokens = shape.num_windows * shape.seq_len;
      if (takes_tokens(*round, tokens, n)) {
        const int64_t held = 3 * tokens * n * kFloatBytes + 3 * tokens * tokens * kDoubleBytes;
        largest = std::max({largest, held + forward_bytes(config, tokens), held + bytes + weight * 2 * kFloatBytes});
        continue;
      }
      // The moments, the error and its product with them.
      const int64_t correcting = round->low_rank ? square * kDoubleBytes + weight * 2 * kDoubleBytes : 0;
      bytes = std::max({collecting, gptq ? bytes + solving : 0, bytes + correcting});
    }
    largest = std::max(largest, bytes);
  }
  return block + largest;
}

/// While one block is learned: weights in float32 and in the dtype of the products, and the graph of one step.
int64_t learning_bytes(const LearnStep& step, const ModelConfig& config, const Recipe& recipe, const RunShape& shape) {
  const int64_t values = block_values(config), tokens = step.batch_size * shape.seq_len;
  int64_t bytes = values * (kFloatBytes + size_of(step.products));
  // The original weights; what the factors reach is rotated, scaled and rounded anew in each step, which keeps
  // several stages of each.
  const bool matrices = std::ranges::any_of(
      transform_leaves(), [&](const TransformLeaf& leaf) { return learns(step, leaf.what) && leaf.what != "scale"; });
  if (learns(step, "scale") || matrices || learns(step, "weight_clip") || learns(step, "weight_lora")) {
    bytes += values * kFloatBytes + values / 2 * 6 * kFloatBytes;
  }
  if (matrices) bytes += matrix_values(config, recipe, everywhere) * kLearnedCopies * kFloatBytes;
  // The weight before rounding, Q, W_F and its gradient in both types, with the graph of one step.
  if (learns(step, "low_rank")) bytes += values * (4 * kFloatBytes + size_of(step.products) + 1);
  // Twice the weight before rounding, the leaf with its gradient, Adam's moments and best state, which thin matrices
  // do without, the rounded weight and its gradient in both types.
  if (learns(step, "weight_offset") || learns(step, "weight_value")) {
    bytes += values * ((step.rank > 0 ? 8 : 11) * kFloatBytes + 2 * size_of(step.products));
  } else if (learns(step, "weight_scale") || learns(step, "weight_zero_point")) {
    bytes += values * (5 * kFloatBytes + size_of(step.products));
  }
  // A forward pass keeps for backward about twice what it holds at a time without.
  return bytes + 3 * forward_bytes(config, tokens);
}

/// The same of a whole window of blocks, which one graph holds.
int64_t learning_bytes(const ModelConfig& config, const Recipe& recipe, const RunShape& shape) {
  int64_t largest = 0;
  for (const Pass& pass : recipe.passes) {
    const int64_t num_blocks = std::min(largest_window(pass), config.num_hidden_layers);
    for (const Step& any : pass.steps) {
      const auto* step = std::get_if<LearnStep>(&any);
      if (step == nullptr || !step->learns()) continue;
      largest = std::max(largest, num_blocks * learning_bytes(*step, config, recipe, shape));
    }
  }
  return largest;
}

/// Values of which learn steps over the model have leaves in all blocks, with gradient, two moments and the best state.
int64_t model_leaf_bytes(const ModelConfig& config, const Recipe& recipe) {
  int64_t values = 0;
  for (const LinearShape& linear : linear_shapes(config)) {
    const QuantSpec* grid = recipe.grids.weights ? &*recipe.grids.weights : nullptr;
    const int64_t groups = grid && grid->strategy == Strategy::kGroup ? linear.in_features / grid->group_size : 1;
    values += linear.out_features * groups;
  }
  for (const SiteInfo& info : sites()) {
    values += info.point.empty() ? 0 : 3 * site_shape(info.site, config).features;
  }
  return 5 * values * kFloatBytes * config.num_hidden_layers;
}

/// While the model is learned as a whole: one block from its codes with its graph, the inputs of all blocks, two heads,
/// and four times the logits of a chunk of rows.
int64_t model_learning_bytes(const ModelConfig& config, const Recipe& recipe, const RunShape& shape) {
  int64_t largest = 0;
  for (const Pass& pass : recipe.passes) {
    if (pass.over != Pass::Over::kModel) continue;
    for (const Step& any : pass.steps) {
      const auto& step = std::get<LearnStep>(any);
      if (!step.learns()) continue;
      const int64_t tokens = step.batch_size * shape.seq_len, values = block_values(config);
      const int64_t block = values * (2 * kFloatBytes + size_of(step.products)) + 3 * forward_bytes(config, tokens);
      const int64_t inputs = tokens * config.hidden_size * kFloatBytes * config.num_hidden_layers;
      const int64_t heads = config.vocab_size * config.hidden_size * 2 * size_of(step.products);
      const int64_t logits = 4 * std::min(kRowsOfLogits, tokens) * config.vocab_size * kFloatBytes;
      largest = std::max(largest, std::max(block, logits) + inputs + heads + model_leaf_bytes(config, recipe));
    }
  }
  return largest;
}

/// A matrix as it is written.
int64_t matrix_bytes(const std::optional<QuantSpec>& grid, int64_t rows, int64_t columns, int64_t unquantized) {
  if (!grid) return rows * columns * unquantized + kHeaderBytes;
  int64_t bytes = 0;
  for (const auto& [name, info] : quantized_weight_infos("", *grid, rows, columns)) {
    bytes += info.numel() * size_of(info.dtype) + kHeaderBytes;
  }
  return bytes;
}

/// A linear of a block as it is written, with the bias that corrections may give it.
int64_t linear_bytes(const Recipe& recipe, const std::string& name, int64_t rows, int64_t columns, int64_t matrix) {
  const std::optional<QuantSpec>& grid = recipe.grids.weights_of(name);
  int64_t bytes = matrix_bytes(grid, rows, columns, matrix);
  if (const LowRankOptions* low_rank = low_rank_of(recipe); low_rank && grid) {
    const int64_t rank = low_rank_values(recipe, {"", rows, columns, false});
    bytes += rank * size_of(low_rank->dtype) + 4 * kHeaderBytes;
  }
  return bytes + (recipe.has_mean_shift() ? rows * kFloatBytes + kHeaderBytes : 0);
}

/// Gains, shifts and clips of a block's quant points, if there are any: at most one gain and one shift per feature.
int64_t point_bytes(const ModelConfig& config, const Recipe& recipe) {
  int64_t bytes = 0;
  for (const SiteInfo& info : sites()) {
    const bool quantized =
        !info.point.empty() && (info.cache ? recipe.grids.kv_cache : recipe.grids.input_activations).has_value();
    if (quantized) bytes += 2 * site_shape(info.site, config).features * kFloatBytes + 3 * kHeaderBytes;
  }
  return bytes;
}

/// Order and count of the Hadamard transform that every online site may have, and the matrices there.
int64_t transform_bytes(const ModelConfig& config, const Recipe& recipe) {
  return std::count_if(sites().begin(), sites().end(), is_online) * (2 * kLongBytes + kHeaderBytes) +
         matrix_values(config, recipe, is_online) * kFloatBytes;
}

/// The state of a block between two passes: its codes, if a pass before the last rounds, and its matrices.
int64_t state_bytes(const ModelConfig& config, const Recipe& recipe) {
  bool codes = false;
  const std::vector<Pass> passes = passes_with_blocks_last(recipe.passes);
  for (size_t pass = 0; pass + 1 < passes.size(); ++pass) {
    for (const Step& step : passes[pass].steps) codes = codes || std::holds_alternative<RoundStep>(step);
  }
  return (codes ? block_values(config) : 0) + matrix_values(config, recipe, everywhere) * kFloatBytes;
}

/// The stage of a block that needs most, and the streams, where the block is computed.
std::vector<Footprint::Part> block_parts(const ModelConfig& config, const Recipe& recipe, const RunShape& shape) {
  const int64_t tokens = shape.num_windows * shape.seq_len, values = block_values(config);
  const int64_t forward =
      tokens > 0 ? forward_bytes(config, std::min(tokens, std::max(shape.tokens_per_batch, shape.seq_len))) : 0;
  const int64_t merging = merging_bytes(config, recipe);
  const int64_t rounding = rounding_bytes(config, recipe, shape);
  const int64_t learning = learning_bytes(config, recipe, shape);
  const int64_t passing = values * (kFloatBytes + 1) + forward;
  const int64_t whole = model_learning_bytes(config, recipe, shape);
  const int64_t block = std::max({merging, rounding, learning, passing, whole});
  const char* stage = block == whole      ? "learning over the model"
                      : block == rounding ? "rounding"
                      : block == learning ? "learning"
                      : block == merging  ? "merging"
                                          : "a pass";
  return {{std::string("one block, at most while ") + stage, block}, {"what the allocator keeps between", block / 20}};
}

std::vector<Footprint::Part> stream_parts(const ModelConfig& config, const Recipe& recipe, const RunShape& shape) {
  const int64_t tokens = (shape.num_windows - shape.num_elsewhere) * shape.seq_len;
  if (tokens == 0) return {};
  const int64_t stream = tokens * config.hidden_size * size_of(recipe.activations_dtype);
  const int64_t streams = num_streams(recipe);
  std::vector<Footprint::Part> parts = {
      {streams == 3 ? "three activation streams" : "four activation streams", streams * stream}};
  if (!recipe.rounding_needs_moments()) return parts;
  // The inputs of o_proj, in whose place the stream after attention comes where it is as wide.
  const int64_t heads = config.num_attention_heads * config.head_dim;
  const int64_t width = heads == config.hidden_size ? heads : heads + config.hidden_size;
  parts.push_back({"a stream inside the block", tokens * width * kFloatBytes});
  return parts;
}

/// Between the start of a run and its first block, where the table is rotated or rounded.
int64_t embedding_bytes(const ModelConfig& config, const Recipe& recipe, const RunShape& shape) {
  const int64_t value = recipe.grids.embedding ? 1 : size_of(recipe.dtype.value_or(shape.checkpoint_dtype));
  return config.vocab_size * config.hidden_size * value;
}

}  // namespace

int64_t Footprint::bytes() const {
  return std::accumulate(parts.begin(), parts.end(), int64_t{0},
                         [](int64_t sum, const Part& part) { return sum + part.bytes; });
}

int64_t forward_bytes(const ModelConfig& config, int64_t num_tokens) {
  const int64_t attention = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim;
  return num_tokens * kFloatBytes * (5 * config.hidden_size + 2 * attention + 4 * config.intermediate_size);
}

Footprint quantization_memory(const ModelConfig& config, const Recipe& recipe, const RunShape& shape) {
  const int64_t values = block_values(config);
  Footprint memory;
  const auto add = [&](const std::vector<Footprint::Part>& parts) {
    memory.parts.insert(memory.parts.end(), parts.begin(), parts.end());
  };
  const std::vector<Footprint::Part> block = block_parts(config, recipe, shape);
  if (shape.on_device) {
    memory.parts.push_back({"one block on its way to the output",
                            output_bytes(config, recipe, shape.checkpoint_dtype).blocks / config.num_hidden_layers});
  } else {
    memory.parts.push_back(block[0]);
  }
  memory.parts.push_back({"one block of the mapped checkpoint", values * size_of(shape.checkpoint_dtype)});
  if (const int64_t matrices = matrix_values(config, recipe, everywhere); matrices > 0 && !shape.on_device) {
    memory.parts.push_back({"the matrices of a block's transforms", matrices * kFloatBytes});
  }
  if (const int64_t state = state_bytes(config, recipe);
      passes_with_blocks_last(recipe.passes).size() > 1 && state > 0) {
    memory.parts.push_back({"the states of all blocks between two passes", state * config.num_hidden_layers});
  }
  if (recipe.rotates_residual() && !shape.on_device) {
    memory.parts.push_back({"the rotated embedding", embedding_bytes(config, recipe, shape)});
  }
  if (!shape.activations_on_disk && !shape.streams_on_device) add(stream_parts(config, recipe, shape));
  if (shape.gathers_streams) {
    const int64_t stream = shape.num_windows * shape.seq_len * config.hidden_size * size_of(recipe.activations_dtype);
    memory.parts.push_back({"two streams of all processes, to be kept", 2 * stream});
  }
  if (!shape.on_device) memory.parts.push_back(block[1]);
  memory.parts.push_back({"the program", kProcessBytes});
  return memory;
}

Footprint quantization_device_memory(const ModelConfig& config, const Recipe& recipe, const RunShape& shape) {
  Footprint memory{block_parts(config, recipe, shape)};
  const auto add = [&](const std::string& what, int64_t bytes) {
    if (bytes > 0) memory.parts.push_back({what, bytes});
  };
  // What fused kernels of the CPU keep in registers are tensors there: some of the size of a weight, or of a chunk of
  // it, while clips are searched, and some of the activations at each quant point.
  const int64_t largest = config.hidden_size * config.intermediate_size;
  add("weights on the way to their grid", std::min(largest, kSearchChunk) * kSearchCopies * kFloatBytes);
  const int64_t tokens = std::min(shape.num_windows * shape.seq_len, std::max(shape.tokens_per_batch, shape.seq_len));
  if (recipe.grids.input_activations || recipe.grids.kv_cache) {
    add("activations on the way to their grid",
        (recipe.learns() ? 2 : 1) * tokens * config.intermediate_size * kPointCopies * kFloatBytes);
  }
  add("matrices of a block's transforms", matrix_values(config, recipe, everywhere) * kFloatBytes);
  add("the embedding, as stored and as written",
      config.vocab_size * config.hidden_size * size_of(shape.checkpoint_dtype) +
          embedding_bytes(config, recipe, shape));
  if (shape.streams_on_device) {
    for (const Footprint::Part& part : stream_parts(config, recipe, shape)) add(part.what, part.bytes);
  }
  return memory;
}

OutputBytes output_bytes(const ModelConfig& config, const Recipe& recipe, at::ScalarType checkpoint_dtype) {
  const int64_t matrix = size_of(recipe.dtype.value_or(checkpoint_dtype));
  // A rotation of the residual stream gives the head weights of its own.
  ModelConfig written = config;
  written.tie_word_embeddings = config.tie_word_embeddings && recipe.keeps_tied_head();
  const int64_t in_each = kLogBytes + point_bytes(config, recipe) + transform_bytes(config, recipe);
  OutputBytes bytes{.blocks = config.num_hidden_layers * in_each, .surroundings = kFilesBytes};
  for_each_tensor(written, [&](const std::string& name, at::IntArrayRef shape) {
    int64_t& sum = name.starts_with("model.layers.") ? bytes.blocks : bytes.surroundings;
    if (shape.size() == 1) {
      sum += shape[0] * kFloatBytes + kHeaderBytes;
    } else if (&sum == &bytes.surroundings) {
      sum += matrix_bytes(name.starts_with("lm_head") ? recipe.grids.head : recipe.grids.embedding, shape[0], shape[1],
                          matrix);
    } else {
      sum += linear_bytes(recipe, name.substr(0, name.rfind('.')), shape[0], shape[1], matrix);
    }
  });
  return bytes;
}

int64_t stage_bytes(const ModelConfig& config, const Recipe& recipe) {
  // Codes and matrices; the other factors and corrections are small. The old state is there until the new one is whole.
  const int64_t codes = recipe.round_step() && recipe.learns() ? block_values(config) : 0;
  int64_t num_blocks = 1;
  for (const Pass& pass : recipe.passes) num_blocks = std::max(num_blocks, largest_window(pass));
  const int64_t between_steps = 2 * num_blocks * (codes + matrix_values(config, recipe, everywhere) * kFloatBytes);
  const auto earlier_passes = static_cast<int64_t>(passes_with_blocks_last(recipe.passes).size()) - 1;
  return between_steps + earlier_passes * config.num_hidden_layers * state_bytes(config, recipe);
}

}  // namespace baseq

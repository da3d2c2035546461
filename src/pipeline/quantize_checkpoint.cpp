#include "baseq/pipeline/quantize_checkpoint.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>

#include "baseq/io/run_journal.h"
#include "baseq/model/model.h"
#include "baseq/model/modeling_source.h"
#include "baseq/pipeline/activation_ranges.h"
#include "baseq/pipeline/balance.h"
#include "baseq/pipeline/learn.h"
#include "baseq/pipeline/merge.h"
#include "baseq/pipeline/round_layer.h"
#include "baseq/pipeline/run_log.h"
#include "baseq/pipeline/start_points.h"
#include "baseq/pipeline/statistics.h"
#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

using Clock = std::chrono::steady_clock;

/// Rows of the embedding that are rotated in float64 at a time.
constexpr int64_t kRowsPerChunk = 4096;
/// Calibration tokens that the ranges in the log are of.
constexpr int64_t kMeasuredTokens = 2048;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// `matrix` [rows, hidden] with its columns scaled and rotated in float64, rounded to `dtype`.
Tensor rotate_rows(const Tensor& matrix, const Tensor& column_gain, at::ScalarType dtype) {
  Tensor result = at::empty(matrix.sizes(), matrix.options().dtype(dtype));
  for (int64_t begin = 0; begin < matrix.size(0); begin += kRowsPerChunk) {
    const int64_t rows = std::min(kRowsPerChunk, matrix.size(0) - begin);
    Tensor chunk = matrix.narrow(0, begin, rows).to(at::kDouble);
    if (column_gain.defined()) chunk = chunk * column_gain;
    result.narrow(0, begin, rows).copy_(hadamard_transform(chunk));
  }
  return result;
}

bool has_block_hadamards(const Recipe::Transforms& transforms) {
  return transforms.input || transforms.value || transforms.query_key || transforms.o || transforms.down;
}

/// One run over the blocks of a checkpoint.
class Run {
 public:
  Run(const Checkpoint& checkpoint, const Recipe& recipe, const Tensor& windows, const QuantizeOptions& options)
      : checkpoint_(checkpoint),
        recipe_(recipe),
        options_(options),
        // What is rotated is rotated in float64; else weights come as what they are computed with.
        model_(checkpoint, {.dtype = recipe.transforms.residual ? at::kDouble : at::kFloat, .device = options.device}),
        windows_(windows) {
    TORCH_CHECK(!model_.quantization(), checkpoint.path().string(),
                ": is already quantized; quantize the original checkpoint instead");
    TORCH_CHECK(windows.defined() || !recipe.needs_calibration(), "quantize: recipe \"", recipe.name,
                "\" needs calibration windows");
    const int64_t dim = model_.config().head_dim;
    if (recipe_.kv_cache) recipe_.kv_cache->spec.group_size = dim;
    dtype_ = recipe_.dtype.value_or(model_.tensors().tensor("model.embed_tokens.weight").scalar_type());
    compute_ = at::TensorOptions().dtype(at::kFloat).device(options.device);
  }

  void write(const std::filesystem::path& output) {
    CheckpointWriter writer(output, options_.output);
    std::optional<RunJournal> journal;
    if (!options_.work_directory.empty()) journal.emplace(options_.work_directory, describe(output));
    const int64_t num_blocks = model_.config().num_hidden_layers;
    const Tensor embedding = write_surroundings(writer);
    start_streams(embedding);
    const int64_t first = journal ? journal->num_steps() : 0;
    const auto run_start = Clock::now();
    const RunStarted started = start_event();
    log_ = log_line(to_json(started));
    if (options_.progress) options_.progress(started);
    for (int64_t block = 0; block < first; ++block) {
      for (const auto& [name, tensor] : journal->step(block)) writer.add(name, tensor);
      for (const nlohmann::json& event : journal->notes(block)) log_ += log_line(event);
    }
    if (first > 0) {
      if (options_.progress) options_.progress(RunResumed{first, num_blocks});
      for (const auto& [name, tensor] : journal->state()) streams_by_name().at(name)->copy_(tensor);
    }
    for (int64_t block = first; block < num_blocks; ++block) {
      const auto start = Clock::now();
      report_(BlockStarted{block, num_blocks});
      const auto tensors = layer_tensors(quantize_block(block), layer_prefix(block), dtype_);
      for (const auto& [name, tensor] : tensors) writer.add(name, tensor);
      // Into the journal with the rest of the block, but told only when the block is durable.
      const BlockFinished finished{block, num_blocks, stream_error(), seconds_since(start), peak_memory_bytes()};
      nlohmann::json notes = std::exchange(block_events_, nlohmann::json::array());
      notes.push_back(to_json(finished));
      if (journal) {
        RunJournal::Tensors streams;
        for (const auto& [name, stream] : streams_by_name()) streams[name] = *stream;
        journal->finish_step(tensors, streams, notes);
      }
      for (const nlohmann::json& event : notes) log_ += log_line(event);
      if (options_.progress) options_.progress(finished);
      if (block + 1 < num_blocks && options_.should_stop && options_.should_stop()) {
        throw Interrupted("stopped after block " + std::to_string(block + 1) + " of " + std::to_string(num_blocks));
      }
    }
    if (has_modeling_file()) writer.write_file(kModelingFile, modeling_source());
    writer.write_file(kRunLogFile, log_);
    writer.copy_side_files(checkpoint_.path());
    writer.finish(output_config());
    if (options_.progress) options_.progress(RunFinished{seconds_since(run_start)});
  }

  /// Quantizes the first block and forgets it; seconds without what a run does once.
  double time_first_block() {
    start_streams(quantized_embedding());
    const auto start = Clock::now();
    (void)layer_tensors(quantize_block(0), layer_prefix(0), dtype_);
    return seconds_since(start);
  }

 private:
  /// Empty when there is no calibration.
  std::map<std::string, Tensor*> streams_by_name() {
    if (!windows_.defined()) return {};
    return {{"full_precision", &streams_.full_precision}, {"quantized", &streams_.quantized}};
  }

  RunJournal::Description describe(const std::filesystem::path& output) const {
    namespace fs = std::filesystem;
    nlohmann::json files = nlohmann::json::object();
    for (const auto& entry : fs::directory_iterator(checkpoint_.path())) {
      const std::string name = entry.path().filename().string();
      if (name != "config.json" && !name.ends_with(".safetensors") && !name.ends_with(".index.json")) continue;
      const auto modified = fs::last_write_time(entry.path()).time_since_epoch();
      files[name] = {{"bytes", fs::file_size(entry.path())},
                     {"modified", std::chrono::duration_cast<std::chrono::nanoseconds>(modified).count()}};
    }
    RunJournal::Description description{
        .identity = {{"format_version", QuantizationConfig::kFormatVersion},
                     {"model", {{"path", fs::absolute(checkpoint_.path()).string()}, {"files", files}}},
                     {"recipe", recipe_.to_json()},
                     {"seed", options_.seed},
                     {"device", options_.device.str()},
                     {"threads", at::get_num_threads()},
                     {"tokens_per_batch", options_.tokens_per_batch}},
        .details = {{"output", fs::absolute(output).string()},
                    {"shard_bytes", options_.output.shard_bytes},
                    {"force", options_.output.force},
                    {"activations_directory", options_.activations_directory.string()}},
        .inputs = {}};
    if (windows_.defined()) description.inputs["input_ids"] = windows_;
    return description;
  }

  RunStarted start_event() const {
    const std::filesystem::path& path = checkpoint_.path();
    return {.model = (path.has_filename() ? path : path.parent_path()).filename().string(),
            .num_blocks = model_.config().num_hidden_layers,
            .num_samples = windows_.defined() ? windows_.size(0) : 0,
            .seq_len = windows_.defined() ? windows_.size(1) : 0,
            .seed = options_.seed,
            .device = options_.device.str(),
            .num_threads = at::get_num_threads()};
  }

  /// The table as the quantized model has it, [vocab_size, hidden_size].
  Tensor quantized_embedding() const {
    const Tensor table = model_.tensors().tensor("model.embed_tokens.weight").to(options_.device);
    return recipe_.transforms.residual ? rotate_rows(table, {}, dtype_) : table.to(dtype_);
  }

  /// Writes what surrounds the blocks: embedding, final norm, head. Returns the embedding.
  Tensor write_surroundings(CheckpointWriter& writer) const {
    if (recipe_.transforms.residual) {
      const Tensor table = model_.tensors().tensor("model.embed_tokens.weight").to(options_.device);
      const RmsNorm norm = model_.final_norm();
      const Tensor head =
          model_.config().tie_word_embeddings ? table : model_.tensors().tensor("lm_head.weight").to(options_.device);
      writer.add("lm_head.weight", rotate_rows(head, norm.weight, dtype_).cpu());
      writer.add("model.norm.weight", at::ones_like(norm.weight, at::kFloat).cpu());
    } else {
      writer.add("model.norm.weight", model_.final_norm().weight.to(at::kFloat).cpu());
      if (!model_.config().tie_word_embeddings) {
        writer.add("lm_head.weight", model_.tensors().tensor("lm_head.weight").to(dtype_));
      }
    }
    const Tensor embedding = quantized_embedding();
    writer.add("model.embed_tokens.weight", embedding);
    checkpoint_.release_pages();
    return embedding;
  }

  /// Puts both streams before the first block.
  void start_streams(const Tensor& embedding) {
    if (!windows_.defined()) return;
    const ModelConfig& config = model_.config();
    const std::vector<int64_t> shape{windows_.size(0), windows_.size(1), config.hidden_size};
    const ActivationStorage storage{.dtype = recipe_.activations_dtype, .directory = options_.activations_directory};
    for (Tensor* stream : {&streams_.full_precision, &streams_.quantized, &target_}) *stream = storage.allocate(shape);
    for (int64_t n = 0; n < windows_.size(0); ++n) {
      const Tensor ids = windows_.narrow(0, n, 1);
      const Tensor exact = model_.embed(ids);
      streams_.full_precision.narrow(0, n, 1).copy_(recipe_.transforms.residual ? hadamard_transform(exact) : exact);
      const Tensor written = at::embedding(embedding, ids.to(options_.device)).to(compute_);
      streams_.quantized.narrow(0, n, 1).copy_(written * config.embedding_multiplier);
    }
    streams_.rope = RotaryEmbedding::create(config, windows_.size(1), compute_);
    streams_.tokens_per_batch = options_.tokens_per_batch;
    checkpoint_.release_pages();
  }

  /// The block in the basis of the streams, transforms of the residual merged in float64.
  DecoderLayer read_block(int64_t block) const {
    DecoderLayer layer = model_.layer(block);
    if (recipe_.transforms.residual) {
      fuse_norm_gains(layer);
      rotate_residual(layer);
    }
    return layer;
  }

  /// The first windows of a stream.
  Tensor measured(const Tensor& stream) const {
    const int64_t count =
        std::clamp<int64_t>(std::min(kMeasuredTokens, options_.tokens_per_batch) / stream.size(1), 1, stream.size(0));
    return stream.narrow(0, 0, count).to(compute_);
  }

  /// Of the block as the checkpoint has it, which is read for this alone: held beside the one in float64, it would add
  /// to the peak.
  std::map<std::string, ActivationRange> original_ranges(int64_t block) const {
    const Tensor windows = measured(streams_.full_precision);
    return activation_ranges(model_.layer(block).to(compute_),
                             recipe_.transforms.residual ? hadamard_transform(windows, /*transpose=*/true) : windows,
                             streams_.rope);
  }

  DecoderLayer quantize_block(int64_t block) {
    std::map<std::string, ActivationRange> before;
    if (windows_.defined()) before = original_ranges(block);
    DecoderLayer layer = read_block(block);
    const bool learned = recipe_.learn_transforms.epochs > 0;
    Tensor weights;
    if (windows_.defined()) {
      layer = std::move(layer).to(compute_);
      advance(layer, streams_.full_precision, target_, streams_.rope, options_.tokens_per_batch);
      weights = token_weights(target_, recipe_.loss, compute_);
      balance(layer, recipe_.transforms, streams_, weights);
    }
    const LearningTask task{.recipe = recipe_,
                            .inputs = streams_,
                            .target = target_,
                            .token_weights = weights,
                            .seed = options_.seed,
                            .block = block,
                            .progress = report_};
    if (learned) {
      learn_transforms(layer, task);
    } else {
      if (has_block_hadamards(recipe_.transforms)) {
        layer = std::move(layer).to(at::kDouble);
        apply_hadamards(layer, recipe_.transforms);
      }
      layer = std::move(layer).to(compute_);
      start_quant_points(layer, recipe_, streams_, weights);
    }
    if (recipe_.weights) round_layer(layer, recipe_, streams_, weights, block, report_);
    if (recipe_.learn_activations.epochs > 0) learn_activations(layer, task);
    merge_corrections(layer);
    if (windows_.defined()) {
      for (const PointMeasured& point :
           measure_points(block, before, layer, measured(streams_.quantized), streams_.rope)) {
        report_(point);
      }
      advance(layer, streams_.quantized, streams_.quantized, streams_.rope, options_.tokens_per_batch);
      std::swap(streams_.full_precision, target_);
    }
    return layer;
  }

  double stream_error() const {
    if (!windows_.defined()) return std::numeric_limits<double>::quiet_NaN();
    std::vector<Tensor> errors;
    for_each_batch(streams_.quantized, compute_, [&](int64_t begin, const Tensor& windows) {
      const Tensor exact = streams_.full_precision.narrow(0, begin, windows.size(0)).to(compute_);
      errors.push_back((windows - exact).square().sum(-1) / exact.square().sum(-1));
    });
    return at::cat(errors).median().item<double>();
  }

  /// The file is a Llama; it knows nothing of what sets the other architectures apart.
  bool has_modeling_file() const { return model_.config().architecture == "LlamaForCausalLM"; }

  nlohmann::json output_config() const {
    nlohmann::json config = checkpoint_.config();
    if (recipe_.transforms.residual) config["tie_word_embeddings"] = false;
    nlohmann::json quantization = to_json(recipe_.quantization_config());
    quantization["recipe"] = recipe_.to_json();
    config["quantization_config"] = quantization;
    if (has_modeling_file()) config["auto_map"]["AutoModelForCausalLM"] = kModelingClass;
    return config;
  }

  const Checkpoint& checkpoint_;
  Recipe recipe_;
  const QuantizeOptions& options_;
  Model model_;
  Tensor windows_;
  BlockInputs streams_;
  Tensor target_;  ///< the full-precision stream after the block
  at::ScalarType dtype_;
  at::TensorOptions compute_;
  std::string log_;  ///< kRunLogFile so far
  nlohmann::json block_events_ = nlohmann::json::array();
  /// Every event between the first and the last of a block.
  ProgressFn report_ = [this](const ProgressEvent& event) {
    block_events_.push_back(to_json(event));
    if (options_.progress) options_.progress(event);
  };
};

}  // namespace

StoredRun read_stored_run(const std::filesystem::path& work_directory) {
  const RunJournal::Description description = RunJournal::describe(work_directory);
  const auto& [identity, details, inputs] = description;
  try {
    StoredRun run;
    run.model = identity.at("model").at("path").get<std::string>();
    run.output = details.at("output").get<std::string>();
    run.recipe = Recipe::from_json(identity.at("recipe"), (work_directory / "run.json").string() + ": recipe");
    if (const auto it = inputs.find("input_ids"); it != inputs.end()) run.windows = it->second;
    run.options.device = at::Device(identity.at("device").get<std::string>());
    run.options.seed = identity.at("seed").get<uint64_t>();
    run.options.output.shard_bytes = details.at("shard_bytes").get<int64_t>();
    run.options.output.force = details.at("force").get<bool>();
    run.options.activations_directory = details.at("activations_directory").get<std::string>();
    run.options.work_directory = work_directory;
    run.options.tokens_per_batch = identity.value("tokens_per_batch", kTokensPerBatch);
    run.num_threads = identity.at("threads").get<int64_t>();
    return run;
  } catch (const nlohmann::json::exception& error) {
    TORCH_CHECK(false, work_directory.string(), ": run.json does not describe a quantization: ", error.what());
  }
}

void quantize_checkpoint(const Checkpoint& checkpoint, const Recipe& recipe, const Tensor& windows,
                         const std::filesystem::path& output, const QuantizeOptions& options) {
  const c10::NoGradGuard no_grad;
  Run(checkpoint, recipe, windows, options).write(output);
}

double estimate_seconds(const Checkpoint& checkpoint, const Recipe& recipe, const Tensor& windows,
                        const QuantizeOptions& options) {
  const c10::NoGradGuard no_grad;
  // What a window adds is measured apart from what a block takes whatever their number.
  constexpr int64_t kFewWindows = 4;
  QuantizeOptions quiet = options;
  quiet.progress = {};
  quiet.activations_directory.clear();
  const auto block_with = [&](int64_t num_windows) {
    const Tensor some = windows.defined() ? windows.narrow(0, 0, num_windows) : Tensor{};
    return Run(checkpoint, recipe, some, quiet).time_first_block();
  };
  double block = 0;
  const int64_t n = windows.defined() ? windows.size(0) : 0;
  if (n <= kFewWindows) {
    block = block_with(n);
  } else {
    const double few = block_with(kFewWindows), one = block_with(1);  // the first of them reads the file
    block = one + std::max(0.0, few - one) / (kFewWindows - 1) * static_cast<double>(n - 1);
  }
  return block * static_cast<double>(Model(checkpoint).config().num_hidden_layers);
}

}  // namespace baseq

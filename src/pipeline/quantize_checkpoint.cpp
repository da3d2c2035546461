#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "baseq/formats/open_model.h"
#include "baseq/model/model.h"
#include "baseq/pipeline/job.h"
#include "baseq/tokenizer/token_windows.h"
#include "block_quantizer.h"
#include "device_plan.h"
#include "formats/native/config.h"
#include "formats/native/modeling_source.h"
#include "grid_overrides.h"
#include "io/hub_cache.h"
#include "io/run_journal.h"
#include "io/side_files.h"
#include "model/named_tensors.h"
#include "model/quantized_linear.h"
#include "pipeline/run_log.h"
#include "run_description.h"
#include "vocabulary_table.h"

namespace baseq {
namespace {

using Clock = std::chrono::steady_clock;

/// How often a work directory gets the full-precision stream. Resuming passes it through the blocks since then again,
/// 1.5 passes on average where quantizing a block takes at least five, and a run writes 1.25 streams a block, not 2.
constexpr int64_t kBlocksPerFullPrecisionStream = 4;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// One run over the blocks of a checkpoint.
class Run {
 public:
  explicit Run(const Job& job)
      : job_(job),
        options_(job.options),
        recipe_(job.recipe),
        // The residual rotation is merged in float64; otherwise weights are loaded as float32.
        model_(stored_model(job),
               {.dtype = recipe_.rotates_residual() ? at::kDouble : at::kFloat, .device = options_.device}),
        blocks_(model_, recipe_, job.windows, block_options()) {
    TORCH_CHECK(!model_.quantization(), checkpoint().path().string(),
                ": is already quantized; quantize the original checkpoint instead");
    TORCH_CHECK(windows().defined() || !recipe_.needs_calibration(), needs_windows(recipe_));
    if (windows().defined()) check_token_ids(windows(), model_.config().vocab_size, "quantize: calibration windows");
    recipe_.grids = blocks_.grids();  // for this model
    const std::vector<std::string> unmatched = unmatched_patterns(recipe_.grids, model_.config());
    TORCH_CHECK(unmatched.empty(), unmatched.front());
    if (windows().defined() && recipe_.needs_calibration()) {  // what the checkpoint says was used
      recipe_.num_samples = windows().size(0);
      recipe_.seq_len = windows().size(1);
    }
    dtype_ = recipe_.dtype.value_or(model_.tensors().info("model.embed_tokens.weight").dtype);
  }

  void write() {
    const std::vector<std::string> obstacles = find_obstacles(job_);
    TORCH_CHECK(obstacles.empty(), obstacles.front());
    const std::optional<std::string> no_room = device_plan().problem;
    TORCH_CHECK(!no_room, *no_room);
    // Before the writer removes what an earlier process left: that one may still be at work.
    if (!options_.work_directory.empty()) {
      journal_.emplace(options_.work_directory, describe_run(job_, checkpoint(), recipe_));
    }
    CheckpointWriter writer(job_.output, writer_options(job_));
    embedding_ = quantized_embedding();
    start_blocks(embedding_);
    const auto run_start = Clock::now();
    const RunStarted started = start_event();
    log_ = log_line(to_json(started));
    tell(started);
    const int64_t first = journal_ ? journal_->num_steps() : 0;
    for (int64_t turn = 0; turn < first; ++turn) {
      finish_turn(writer, turn, journal_->step(turn), journal_->notes(turn));
    }
    Reached reached = take_up();
    if (first > 0 || reached.step) tell(RunResumed{first, num_turns(), reached.step ? reached.step->name : ""});
    if (first < num_turns()) restore_streams(first);
    for (int64_t turn = first; turn < num_turns(); ++turn) {
      if (turn > first && block_of(turn) == 0) start_blocks(embedding_);
      take_turn(writer, turn, std::exchange(reached, {}));
    }
    if (has_modeling_file()) writer.write_file(kModelingFile, modeling_source());
    writer.write_file(kRunLogFile, log_);
    writer.copy_side_files(checkpoint().path());
    writer.finish(output_config());
    tell(RunFinished{seconds_since(run_start)});
  }

  /// Takes the first block through all passes and forgets it; seconds without what a run does once.
  double time_first_block() {
    const VocabularyTable embedding = quantized_embedding();
    double seconds = 0;
    BlockState state;
    for (int64_t pass = 0; pass < blocks_.num_passes(); ++pass) {
      start_blocks(embedding);
      const auto start = Clock::now();
      const BlockQuantizer::Result result = blocks_.quantize(pass, 0, std::move(state));
      (void)layer_tensors(result.layer, layer_prefix(0), dtype_);
      seconds += seconds_since(start);
      state = result.state;
    }
    return seconds;
  }

 private:
  const Checkpoint& checkpoint() const { return model_.checkpoint(); }
  const Tensor& windows() const { return job_.windows; }

  /// What an earlier process did in the block that comes next.
  struct Reached {
    std::optional<BlockQuantizer::StepEnd> step;
    double seconds = 0;
    nlohmann::json events = nlohmann::json::array();
  };

  void tell(const ProgressEvent& event) const {
    if (job_.progress) job_.progress(event);
  }

  DevicePlan device_plan() const { return plan_device(job_, model_.config(), shape_of(job_, checkpoint())); }

  BlockQuantizer::Options block_options() {
    const auto report = [this](const ProgressEvent& event) {
      block_events_.push_back(to_json(event));
      tell(event);
    };
    return {.compute = at::TensorOptions().dtype(at::kFloat).device(options_.device),
            .storage = {.dtype = recipe_.activations_dtype,
                        .directory = options_.activations_directory,
                        .device = device_plan().streams_on_device ? options_.device : at::Device(at::kCPU)},
            .pass = {.tokens_per_batch = options_.tokens_per_batch, .before_step = [this] { stop_when_asked(); }},
            .seed = options_.seed,
            .report = report};
  }

  Reached take_up() const {
    std::optional<RunJournal::Partial> partial;
    if (journal_) partial = journal_->partial();
    if (!partial) return {};
    const nlohmann::json& notes = partial->notes;
    return {.step = BlockQuantizer::StepEnd{notes.at("num_steps").get<int64_t>(), notes.at("step").get<std::string>(),
                                            std::move(partial->tensors)},
            .seconds = notes.at("seconds").get<double>(),
            .events = notes.at("events")};
  }

  // A turn is one block in one pass.
  int64_t num_blocks() const { return model_.config().num_hidden_layers; }
  int64_t num_turns() const { return blocks_.num_passes() * num_blocks(); }
  int64_t block_of(int64_t turn) const { return turn % num_blocks(); }
  bool in_last_pass(int64_t turn) const { return turn >= num_turns() - num_blocks(); }

  /// @param tensors of the output in the last pass, of the state before
  void finish_turn(CheckpointWriter& writer, int64_t turn, RunJournal::Tensors tensors, const nlohmann::json& events) {
    for (const nlohmann::json& event : events) log_ += log_line(event);
    if (!in_last_pass(turn)) {
      states_[block_of(turn)] = std::move(tensors);
      return;
    }
    states_.erase(block_of(turn));
    if (block_of(turn) == 0) write_surroundings(writer, tensors);
    for (const auto& [name, tensor] : tensors) writer.add(name, tensor);
  }

  /// Tells what happened in a block until it was left, or that it begins.
  void open_turn(Reached& reached, int64_t turn) {
    block_events_ = nlohmann::json::array();
    if (!reached.step) {
      const BlockStarted started{block_of(turn), num_blocks(), turn / num_blocks()};
      block_events_.push_back(to_json(started));
      tell(started);
      return;
    }
    // Told again: a log that takes the block up from its start is whole.
    for (const nlohmann::json& event : reached.events) {
      if (const auto known = progress_event_from_json(event, "journal.json")) tell(*known);
    }
    block_events_ = std::move(reached.events);
  }

  void take_turn(CheckpointWriter& writer, int64_t turn, Reached reached) {
    const auto start = Clock::now();
    const int64_t block = block_of(turn);
    const auto seconds = [&] { return reached.seconds + seconds_since(start); };
    turn_ = turn;
    kept_at_ = start;
    kept_step_ = reached.step ? reached.step->name : "";
    open_turn(reached, turn);
    std::function<void(const BlockQuantizer::StepEnd&)> keep;
    if (journal_) {
      keep = [&](const BlockQuantizer::StepEnd& end) {
        journal_->save_partial(
            end.state,
            {{"num_steps", end.num_steps}, {"step", end.name}, {"seconds", seconds()}, {"events", block_events_}});
        kept_step_ = end.name;
        kept_at_ = Clock::now();
      };
    }
    BlockState state;
    if (const auto it = states_.find(block); it != states_.end()) {
      state = state_from_tensors(it->second, blocks_.grids().in_block(block), options_.device);
    }
    const BlockQuantizer::Result result =
        blocks_.quantize(turn / num_blocks(), block, std::move(state), std::move(reached.step), keep);
    const RunJournal::Tensors tensors =
        in_last_pass(turn) ? layer_tensors(result.layer, layer_prefix(block), dtype_) : state_tensors(result.state);
    // Into the journal with the rest of the block, but told only when the block is durable.
    const BlockFinished finished{block, num_blocks(), blocks_.stream_error(), seconds(), peak_memory_bytes()};
    block_events_.push_back(to_json(finished));
    if (journal_) journal_->finish_step(tensors, streams_to_keep(turn + 1), block_events_);
    finish_turn(writer, turn, tensors, block_events_);
    tell(finished);
  }

  /// The streams that the journal keeps after so many turns. The full-precision one is kept every few blocks only: the
  /// original blocks make it again, to the same bits.
  RunJournal::Tensors streams_to_keep(int64_t num_finished) {
    RunJournal::Tensors kept;
    if (block_of(num_finished) == 0) return kept;  // the next pass begins anew
    for (const auto& [name, stream] : blocks_.streams()) {
      if (name == kFullPrecision && block_of(num_finished) % kBlocksPerFullPrecisionStream != 0) continue;
      kept[name] = *stream;
    }
    return kept;
  }

  /// Puts the streams of a run that is taken up in front of the block of its next turn.
  void restore_streams(int64_t turn) {
    if (block_of(turn) == 0) return;  // they are there
    turn_ = turn;
    int64_t passed = 0;  // blocks that the full-precision stream has behind it
    const auto streams = blocks_.streams();
    for (const auto& [name, kept] : journal_->state()) {
      if (kept.num_steps <= turn - block_of(turn)) continue;  // of an earlier pass
      streams.at(name)->copy_(kept.tensor);
      if (name == kFullPrecision) passed = block_of(kept.num_steps);
    }
    for (; passed < block_of(turn) && !streams.empty(); ++passed) blocks_.pass_full_precision(passed);
  }

  /// Throws when the caller wants the run to end.
  void stop_when_asked() const {
    if (!options_.should_stop || !options_.should_stop()) return;
    std::string message = fmt::format("stopped in block {} of {}", block_of(turn_) + 1, num_blocks());
    if (!journal_) throw Interrupted(message + "; without a work directory nothing is kept");
    message += "; kept are the blocks before";
    if (!kept_step_.empty()) message += " and this one up to its " + kept_step_;
    throw Interrupted(message + fmt::format(", lost the last {:.0f} s of work", seconds_since(kept_at_)));
  }

  RunStarted start_event() const {
    return {.model = model_name(checkpoint().path()),
            .num_blocks = model_.config().num_hidden_layers,
            .num_samples = windows().defined() ? windows().size(0) : 0,
            .seq_len = windows().defined() ? windows().size(1) : 0,
            .seed = options_.seed,
            .device = options_.device.str(),
            .num_threads = at::get_num_threads()};
  }

  VocabularyTable quantized_embedding() const {
    const Tensor table = model_.tensors().tensor("model.embed_tokens.weight").to(options_.device);
    return make_table(table, {}, blocks_.residual(), recipe_.grids.embedding, dtype_);
  }

  void start_blocks(const VocabularyTable& embedding) {
    blocks_.start([&](const Tensor& ids) { return embedding.rows(ids); });
  }

  /// Tensors of the output that are in no block.
  struct Surrounding {
    std::map<std::string, TensorInfo> infos;
    std::function<std::map<std::string, Tensor>()> make;
  };

  Surrounding table(const std::string& name, const std::optional<QuantSpec>& grid,
                    const std::function<VocabularyTable()>& make) const {
    const int64_t rows = model_.config().vocab_size, columns = model_.config().hidden_size;
    Surrounding result{.infos = {{name + ".weight", {dtype_, {rows, columns}}}}, .make = {}};
    if (grid) result.infos = quantized_weight_infos(name, *grid, rows, columns);
    result.make = [name, make] { return make().tensors(name); };
    return result;
  }

  /// Embedding, final norm and head, in the order in which they are written.
  std::vector<Surrounding> surroundings() const {
    const std::string norm_name = "model.norm.weight";
    const Tensor norm = model_.final_norm().weight;
    const bool rotated = !blocks_.residual().empty(), tied = model_.config().tie_word_embeddings;
    Surrounding final_norm{.infos = {{norm_name, {at::kFloat, norm.sizes().vec()}}}, .make = {}};
    final_norm.make = [rotated, norm, norm_name] {
      const Tensor written = rotated ? at::ones_like(norm, at::kFloat) : norm.to(at::kFloat);
      return std::map<std::string, Tensor>{{norm_name, written.cpu()}};
    };
    const Surrounding head = table("lm_head", recipe_.grids.head, [this, norm, tied] {
      const Tensor stored = model_.tensors().tensor(tied ? "model.embed_tokens.weight" : "lm_head.weight");
      return make_table(stored.to(options_.device), norm, blocks_.residual(), recipe_.grids.head, dtype_);
    });
    const Surrounding embedding = table("model.embed_tokens", recipe_.grids.embedding, [this] { return embedding_; });
    if (rotated) return {head, final_norm, embedding};
    if (stays_tied()) return {final_norm, embedding};
    return {final_norm, head, embedding};
  }

  bool stays_tied() const { return model_.config().tie_word_embeddings && recipe_.keeps_tied_head(); }

  /// Writes what surrounds the blocks, and says what follows: blocks with the tensors of the first one.
  void write_surroundings(CheckpointWriter& writer, const RunJournal::Tensors& first_block) {
    const std::vector<Surrounding> parts = surroundings();
    std::vector<CheckpointWriter::Expected> expected;
    for (const Surrounding& part : parts) {
      for (const auto& [name, info] : part.infos) expected.push_back({name, info});
    }
    for (int64_t block = 0; block < model_.config().num_hidden_layers; ++block) {
      for (const auto& [name, info] : infos_of_block(first_block, recipe_.grids, model_.config(), block, dtype_)) {
        expected.push_back({name, info});
      }
    }
    writer.expect(expected);
    for (const Surrounding& part : parts) {
      for (const auto& [name, tensor] : part.make()) writer.add(name, tensor);
    }
    embedding_ = {};
    checkpoint().release_pages();
  }

  bool has_modeling_file() const { return model_.config().architecture == kModelingArchitecture; }

  nlohmann::json output_config() const {
    nlohmann::json config = checkpoint().config();
    remove_code_references(config);
    if (!recipe_.keeps_tied_head()) config["tie_word_embeddings"] = false;
    QuantizationConfig written = recipe_.quantization_config();
    written.overrides = overridden_linears(recipe_.grids, model_.config());
    nlohmann::json quantization = to_json(written);
    quantization["recipe"] = recipe_.to_json();
    config["quantization_config"] = quantization;
    if (has_modeling_file()) config["auto_map"] = {{"AutoModelForCausalLM", kModelingClass}};
    return config;
  }

  const Job& job_;
  const QuantizeOptions& options_;
  Recipe recipe_;  ///< with the grids of this model
  Model model_;
  at::ScalarType dtype_;
  VocabularyTable embedding_;  ///< as the output has it, until it is written
  std::optional<RunJournal> journal_;
  std::string log_;  ///< kRunLogFile so far
  nlohmann::json block_events_ = nlohmann::json::array();
  std::map<int64_t, RunJournal::Tensors> states_;  ///< by block, from the pass before
  int64_t turn_ = 0;                               ///< that is being worked on
  std::string kept_step_;                          ///< the last one of it in the journal
  Clock::time_point kept_at_ = Clock::now();
  BlockQuantizer blocks_;
};

/// Throws for what a run cannot begin with.
void check_input(const Job& job) {
  job.recipe.validate();
  const Tensor& windows = job.windows;
  TORCH_CHECK(!windows.defined() || (windows.dim() == 2 && at::isIntegralType(windows.scalar_type(), false)),
              "quantize: windows are ", windows.sizes(), " of ", windows.dtype(),
              ", expected token ids [num_windows, seq_len]");
}

}  // namespace

void quantize(const Job& job) {
  check_input(job);
  const c10::NoGradGuard no_grad;
  Run(job).write();
}

double estimate_seconds(const Job& job) {
  check_input(job);
  const c10::NoGradGuard no_grad;
  // What a window adds is measured apart from what a block takes whatever their number.
  constexpr int64_t kFewWindows = 4;
  Job quiet = job;
  quiet.model = stored_model(job);  // opened once
  quiet.progress = {};
  quiet.options.activations_directory.clear();
  const auto block_with = [&](int64_t num_windows) {
    if (job.windows.defined()) quiet.windows = job.windows.narrow(0, 0, num_windows);
    return Run(quiet).time_first_block();
  };
  double block = 0;
  const int64_t n = job.windows.defined() ? job.windows.size(0) : 0;
  if (n <= kFewWindows) {
    block = block_with(n);
  } else {
    const double few = block_with(kFewWindows), one = block_with(1);  // the first of them reads the file
    block = one + std::max(0.0, few - one) / (kFewWindows - 1) * static_cast<double>(n - 1);
  }
  return block * static_cast<double>(std::get<StoredModel>(quiet.model).config.num_hidden_layers);
}

}  // namespace baseq

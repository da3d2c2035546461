#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <utility>

#include "baseq/formats/open_model.h"
#include "baseq/model/model.h"
#include "baseq/pipeline/job.h"
#include "baseq/tokenizer/token_windows.h"
#include "formats/model_card.h"
#include "formats/native/config.h"
#include "formats/native/modeling_source.h"
#include "grid_overrides.h"
#include "io/hub_cache.h"
#include "io/side_files.h"
#include "model/named_tensors.h"
#include "model/quantized_linear.h"
#include "pipeline/divided_run.h"
#include "pipeline/run_log.h"
#include "pipeline/run_output.h"
#include "run_description.h"
#include "run_parts.h"
#include "turns.h"
#include "write_card.h"

namespace baseq {
namespace {

using Clock = std::chrono::steady_clock;

/// How often a work directory gets the full-precision stream. Resuming passes it through the blocks since then again,
/// 1.5 passes on average where quantizing a block takes at least five, and a run writes 1.25 streams a block, not 2.
constexpr int64_t kBlocksPerFullPrecisionStream = 4;

/// In a journal, next to the states of blocks.
constexpr const char *kFinalNormFactor = "model.norm.factor", *kResidualMatrix = "model.residual.matrix";

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// One run over the blocks of a checkpoint.
class Run {
 public:
  explicit Run(const Job& job)
      : job_(job), options_(job.options), parts_(job, block_options()), turns_(parts_.blocks.passes(), num_blocks()) {}

  void write() {
    RunOutput::check_place(job_);
    TORCH_CHECK(!parts_.device.problem, *parts_.device.problem);
    // Before the writer removes what an earlier process left: that one may still be at work.
    open_journal();
    RunOutput writer(job_);
    embedding_ = parts_.tables.embedding();
    parts_.start_blocks(embedding_);
    const auto run_start = Clock::now();
    const RunStarted started = start_event();
    log_ = log_line(to_json(started));
    tell(started);
    const int64_t first = journal_ ? journal_->num_steps() : 0;
    for (int64_t turn = 0; turn < first; ++turn) {
      const RunJournal::Tensors tensors = journal_->step(turn);
      finish_turn(writer, turn, tensors, journal_->notes(turn));
    }
    Reached reached = take_up();
    if (first > 0 || reached.step) tell(RunResumed{first, turns_.size(), reached.step ? reached.step->name : ""});
    if (first < turns_.size()) restore_streams(first);
    for (int64_t turn = first; turn < turns_.size(); ++turn) {
      if (turn > first && turns_.starts_pass(turn)) parts_.start_blocks(embedding_);
      take_turn(writer, turn, std::exchange(reached, {}));
    }
    if (has_modeling_file()) writer.write_file(kModelingFile, modeling_source());
    writer.write_file(kRunLogFile, log_);
    const std::string card = quantized_card(checkpoint(), job_.recipe, job_.windows, has_modeling_file());
    if (!card.empty()) writer.write_file(kCardFile, card);
    writer.copy_side_files(checkpoint().path());
    writer.finish(output_config());
    tell(RunFinished{seconds_since(run_start)});
  }

 private:
  const Checkpoint& checkpoint() const { return parts_.stored.tensors; }
  const Tensor& windows() const { return job_.windows; }
  const Shards& shards() const { return parts_.shards; }

  void open_journal() {
    const bool keeps = !options_.work_directory.empty();
    if (!keeps && shards().communicator().size == 1) return;
    const RunJournal::Description description = describe_run(job_, checkpoint(), parts_.recipe);
    check_same_run(shards().communicator(), description);
    if (keeps) journal_.emplace(options_.work_directory, description, shards());
  }

  /// What an earlier process did in the block that comes next.
  struct Reached {
    std::optional<BlockQuantizer::StepEnd> step;
    double seconds = 0;
    nlohmann::json events = nlohmann::json::array();
  };

  void tell(const ProgressEvent& event) const {
    if (job_.progress && shards().communicator().is_first()) job_.progress(event);
  }

  BlockQuantizer::Options block_options() {
    const auto report = [this](const ProgressEvent& event) {
      block_events_.push_back(to_json(event));
      tell(event);
    };
    return {.pass = {.tokens_per_batch = options_.tokens_per_batch, .before_step = [this] { stop_when_asked(); }},
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

  int64_t num_blocks() const { return parts_.model.config().num_hidden_layers; }

  int64_t end_of_turn(int64_t turn) const { return parts_.blocks.end_of_turn(turns_[turn].pass, turns_[turn].block); }

  /// @param tensors of the output in the last pass, of the states before; with the states of later blocks
  void finish_turn(RunOutput& writer, int64_t turn, RunJournal::Tensors tensors, const nlohmann::json& events) {
    for (const nlohmann::json& event : events) log_ += log_line(event);
    const int64_t block = turns_[turn].block;
    if (block == kWholeModel) {
      take_model(tensors);
      return;
    }
    for (int64_t later = block + 1; later < end_of_turn(turn); ++later) {
      states_[later] = take_state_tensors(tensors, later - block);
    }
    if (!turns_.in_last_pass(turn)) {
      states_[block] = std::move(tensors);
      return;
    }
    states_.erase(block);
    if (block == 0) write_surroundings(writer, tensors);
    for (const auto& [name, tensor] : tensors) writer.add(name, tensor);
  }

  /// Tells what happened in a block until it was left, or that it begins.
  void open_turn(Reached& reached, int64_t turn) {
    block_events_ = nlohmann::json::array();
    if (!reached.step) {
      const BlockStarted started{turns_[turn].block, num_blocks(), turns_[turn].pass};
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

  void take_turn(RunOutput& writer, int64_t turn, Reached reached) {
    const auto start = Clock::now();
    const int64_t block = turns_[turn].block;
    const auto seconds = [&] { return reached.seconds + seconds_since(start); };
    turn_ = turn;
    kept_at_ = start;
    kept_step_ = reached.step ? reached.step->name : "";
    open_turn(reached, turn);
    std::function<void(const BlockQuantizer::StepEnd&)> keep;
    if (journal_) {
      keep = [&](const BlockQuantizer::StepEnd& end) {
        journal_->save_partial(
            end.states,
            {{"num_steps", end.num_steps}, {"step", end.name}, {"seconds", seconds()}, {"events", block_events_}});
        kept_step_ = end.name;
        kept_at_ = Clock::now();
      };
    }
    const RunJournal::Tensors tensors =
        block == kWholeModel ? learn_model(turns_[turn].pass) : quantize_block(turn, std::move(reached.step), keep);
    // Into the journal with the rest of the block, but told only when the block is durable.
    const double error = block == kWholeModel ? std::numeric_limits<double>::quiet_NaN() : parts_.blocks.stream_error();
    const BlockFinished finished{block, num_blocks(), error, seconds(), peak_memory_bytes()};
    block_events_.push_back(to_json(finished));
    if (journal_) journal_->finish_step(tensors, streams_to_keep(turn + 1), block_events_);
    finish_turn(writer, turn, tensors, block_events_);
    tell(finished);
  }

  /// What one block is after a pass: in the last one tensors of the output, before its state.
  RunJournal::Tensors quantize_block(int64_t turn, std::optional<BlockQuantizer::StepEnd> reached,
                                     const std::function<void(const BlockQuantizer::StepEnd&)>& keep) {
    const int64_t block = turns_[turn].block;
    BlockQuantizer::States states;
    for (int64_t later = block; later < end_of_turn(turn); ++later) states.push_back(state_of(later));
    BlockQuantizer::Result result =
        parts_.blocks.quantize(turns_[turn].pass, block, std::move(states), std::move(reached), keep);
    if (!turns_.in_last_pass(turn)) return states_tensors(result.states);
    result.states.front() = {};  // its tensors are those of the output
    RunJournal::Tensors tensors = layer_tensors(result.layer, layer_prefix(block), parts_.dtype);
    tensors.merge(states_tensors(result.states));
    return tensors;
  }

  /// The state of the model after a pass over it, see by_block().
  RunJournal::Tensors learn_model(int64_t pass) {
    ModelState state = model_;
    for (int64_t block = 0; block < num_blocks(); ++block) {
      state.blocks.push_back(state_of(block));
      states_.erase(block);
    }
    parts_.learn_model(pass, state);
    RunJournal::Tensors tensors;
    if (state.final_norm.defined()) tensors[kFinalNormFactor] = state.final_norm.cpu();
    if (state.residual.defined()) tensors[kResidualMatrix] = state.residual.cpu();
    for (int64_t block = 0; block < num_blocks(); ++block) {
      for (auto& [name, tensor] : state_tensors(state.blocks[static_cast<size_t>(block)])) {
        tensors[layer_prefix(block) + name] = std::move(tensor);
      }
    }
    return tensors;
  }

  /// The inverse of what learn_model returns.
  void take_model(const RunJournal::Tensors& tensors) {
    states_ = by_block(tensors);
    const auto take = [&](const char* name, Tensor& to) {
      // A copy: what the journal holds is mapped.
      if (const auto it = tensors.find(name); it != tensors.end()) to = it->second.clone().to(options_.device);
    };
    take(kFinalNormFactor, model_.final_norm);
    take(kResidualMatrix, model_.residual);
    parts_.tables.set_norm_factor(model_.final_norm);
    if (!model_.residual.defined()) return;
    parts_.blocks.set_residual_matrix(model_.residual);
    embedding_ = parts_.tables.embedding();
    parts_.start_blocks(embedding_);
  }

  std::map<int64_t, RunJournal::Tensors> by_block(const RunJournal::Tensors& tensors) const {
    std::map<int64_t, RunJournal::Tensors> states;
    for (int64_t block = 0; block < num_blocks(); ++block) {
      const std::string prefix = layer_prefix(block);
      for (auto it = tensors.lower_bound(prefix); it != tensors.end() && it->first.starts_with(prefix); ++it) {
        states[block][it->first.substr(prefix.size())] = it->second;
      }
    }
    return states;
  }

  BlockState state_of(int64_t block) const {
    const auto it = states_.find(block);
    if (it == states_.end()) return {};
    return state_from_tensors(it->second, parts_.blocks.grids().in_block(block), options_.device);
  }

  /// The streams that the journal keeps after so many turns. The full-precision one is kept every few blocks only: the
  /// original blocks make it again, to the same bits.
  RunJournal::Tensors streams_to_keep(int64_t num_finished) {
    RunJournal::Tensors kept;
    if (turns_.starts_pass(num_finished)) return kept;  // it begins anew
    for (const auto& [name, stream] : parts_.blocks.streams()) {
      if (name == kFullPrecision && turns_[num_finished].block % kBlocksPerFullPrecisionStream != 0) continue;
      kept[name] = *stream;
    }
    return kept;
  }

  /// Puts the streams of a run that is taken up in front of the block of its next turn.
  void restore_streams(int64_t turn) {
    if (turns_.starts_pass(turn)) return;  // they are there
    turn_ = turn;
    int64_t passed = 0;  // blocks that the full-precision stream has behind it
    const auto streams = parts_.blocks.streams();
    for (const auto& [name, kept] : journal_->state()) {
      if (kept.num_steps <= turns_.first_of_pass(turn)) continue;  // of an earlier pass
      streams.at(name)->copy_(kept.tensor);
      if (name == kFullPrecision) passed = turns_[kept.num_steps].block;
    }
    for (; passed < turns_[turn].block && !streams.empty(); ++passed) parts_.blocks.pass_full_precision(passed);
  }

  /// Throws when the caller wants the run to end.
  void stop_when_asked() const {
    if (!options_.should_stop || !options_.should_stop()) return;
    const int64_t block = turns_[turn_].block;
    std::string message = block == kWholeModel ? std::string("stopped in a pass over the model")
                                               : fmt::format("stopped in block {} of {}", block + 1, num_blocks());
    if (!journal_) throw Interrupted(message + "; without a work directory nothing is kept");
    message += block == kWholeModel ? "; kept are the passes before" : "; kept are the blocks before";
    if (!kept_step_.empty()) message += " and this one up to its " + kept_step_;
    throw Interrupted(message + fmt::format(", lost the last {:.0f} s of work", seconds_since(kept_at_)));
  }

  RunStarted start_event() const {
    return {.model = model_name(checkpoint().path()),
            .num_blocks = parts_.model.config().num_hidden_layers,
            .num_samples = windows().defined() ? windows().size(0) : 0,
            .seq_len = windows().defined() ? windows().size(1) : 0,
            .seed = options_.seed,
            .device = options_.device.str(),
            .num_threads = at::get_num_threads()};
  }

  /// Writes what surrounds the blocks, and says what follows: blocks with the tensors of the first one.
  void write_surroundings(RunOutput& writer, const RunJournal::Tensors& first_block) {
    const std::vector<OutputTables::Part> parts = parts_.tables.parts(embedding_);
    std::vector<CheckpointWriter::Expected> expected;
    for (const OutputTables::Part& part : parts) {
      for (const auto& [name, info] : part.infos) expected.push_back({name, info});
    }
    for (int64_t block = 0; block < num_blocks(); ++block) {
      for (const auto& [name, info] :
           infos_of_block(first_block, parts_.recipe.grids, parts_.model.config(), block, parts_.dtype)) {
        expected.push_back({name, info});
      }
    }
    writer.expect(expected);
    for (const OutputTables::Part& part : parts) {
      for (const auto& [name, tensor] : part.make()) writer.add(name, tensor);
    }
    embedding_ = {};
    checkpoint().release_pages();
  }

  bool has_modeling_file() const { return parts_.model.config().architecture == kModelingArchitecture; }

  nlohmann::json output_config() const {
    nlohmann::json config = checkpoint().config();
    remove_code_references(config);
    if (!parts_.recipe.keeps_tied_head()) config["tie_word_embeddings"] = false;
    QuantizationConfig written = parts_.recipe.quantization_config();
    written.overrides = overridden_linears(parts_.recipe.grids, parts_.model.config());
    nlohmann::json quantization = to_json(written);
    quantization["recipe"] = parts_.recipe.to_json();
    config["quantization_config"] = quantization;
    if (has_modeling_file()) config["auto_map"] = {{"AutoModelForCausalLM", kModelingClass}};
    return config;
  }

  const Job& job_;
  const QuantizeOptions& options_;
  VocabularyTable embedding_;  ///< as the output has it, until it is written
  std::optional<SharedJournal> journal_;
  std::string log_;  ///< kRunLogFile so far
  nlohmann::json block_events_ = nlohmann::json::array();
  std::map<int64_t, RunJournal::Tensors> states_;  ///< by block, from the pass before
  ModelState model_;                               ///< what is in no block
  int64_t turn_ = 0;                               ///< that is being worked on
  std::string kept_step_;                          ///< the last one of it in the journal
  Clock::time_point kept_at_ = Clock::now();
  RunParts parts_;
  Turns turns_;
};

}  // namespace

void quantize(const Job& job) {
  check_input(job);
  const c10::NoGradGuard no_grad;
  Run(job).write();
}

}  // namespace baseq

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <chrono>

#include "baseq/formats/open_model.h"
#include "block_windows.h"
#include "run_description.h"
#include "run_parts.h"

namespace baseq {
namespace {

template <class Work>
double seconds_of(const Work& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

BlockQuantizer::Options trial_options(const Job& job) {
  return {.pass = {.tokens_per_batch = job.options.tokens_per_batch, .before_step = {}},
          .report = [](const ProgressEvent&) {}};
}

/// What a block takes in the windows of a pass, on the average, next to what the turn of the first one does.
double share_of_learning(const Pass& pass, int64_t num_blocks) {
  double all = 0, first = 0;
  for (const BlockWindow& window : block_windows(pass, num_blocks)) {
    const auto size = static_cast<double>(window.end - window.begin);
    all += size;
    if (window.begin == 0) first += size;
  }
  return all / static_cast<double>(num_blocks) / first;
}

/// Takes the first block through all passes over blocks; seconds without what a run does once.
double time_first_block(const Job& job) {
  RunParts parts(job, trial_options(job));
  const VocabularyTable embedding = parts.tables.embedding();
  double seconds = 0;
  BlockQuantizer::States states(1);
  for (int64_t pass = 0; pass < parts.blocks.num_passes(); ++pass) {
    const Pass& current = parts.blocks.passes()[static_cast<size_t>(pass)];
    if (current.over == Pass::Over::kModel) continue;
    parts.start_blocks(embedding);
    states.assign(static_cast<size_t>(parts.blocks.end_of_turn(pass, 0)), BlockState(states.front()));
    const double taken = seconds_of([&] {
      BlockQuantizer::Result result = parts.blocks.quantize(pass, 0, std::move(states));
      (void)layer_tensors(result.layer, layer_prefix(0), parts.dtype);
      states = std::move(result.states);
    });
    seconds += taken * share_of_learning(current, parts.model.config().num_hidden_layers);
  }
  return seconds;
}

/// Learns from one window and monitors another, in a model of the first block `num_blocks` times.
/// @param parts of a job with two windows, whose learn steps over the model have one epoch and monitor one window
double time_model_step(RunParts& parts, const VocabularyTable& embedding, int64_t pass, const BlockState& state,
                       size_t num_blocks) {
  ModelState model{std::vector<BlockState>(num_blocks, state)};
  parts.start_blocks(embedding);
  return seconds_of([&] { parts.learn_model(pass, model); });
}

/// The passes over the model of a whole run: what a window costs in one block and at the head, times their numbers.
double time_model_passes(const Job& job) {
  Job trial = job;
  trial.windows = job.windows.narrow(0, 0, std::min<int64_t>(2, job.windows.size(0)));
  double windows = 0;  // learned from, in all passes; one that is only monitored takes about a third
  for (Pass& pass : trial.recipe.passes) {
    for (Step& any : pass.steps) {
      auto* step = std::get_if<LearnStep>(&any);
      if (pass.over != Pass::Over::kModel || !step) continue;
      const int64_t held_out = std::min(step->num_monitored, job.windows.size(0) - 1);
      const int64_t learned = std::max<int64_t>(1, job.windows.size(0) - held_out);
      const double epochs = step->steps > 0 ? static_cast<double>(step->steps * step->batch_size) / learned
                                            : static_cast<double>(step->epochs);
      windows += epochs * learned + (epochs + 1) * held_out / 3;
      step->epochs = step->learns() ? 1 : 0;
      step->steps = 0;
      step->num_monitored = step->batch_size = 1;
    }
  }
  if (windows == 0) return 0;
  RunParts parts(trial, trial_options(job));
  const VocabularyTable embedding = parts.tables.embedding();
  BlockState state;
  double one = 0, two = 0;
  const auto num_blocks = static_cast<double>(parts.model.config().num_hidden_layers);
  double num_steps = 0;
  for (int64_t pass = 0; pass < parts.blocks.num_passes(); ++pass) {
    const Pass& current = parts.blocks.passes()[static_cast<size_t>(pass)];
    if (current.over == Pass::Over::kModel) {
      num_steps += static_cast<double>(current.steps.size());
      one += time_model_step(parts, embedding, pass, state, 1);
      two += time_model_step(parts, embedding, pass, state, 2);
    } else {
      parts.start_blocks(embedding);
      BlockQuantizer::States states(static_cast<size_t>(parts.blocks.end_of_turn(pass, 0)), state);
      state = std::move(parts.blocks.quantize(pass, 0, std::move(states)).states.front());
    }
  }
  // A trial is one window learned from and one monitored twice.
  const double block = std::max(0.0, two - one), head = std::max(0.0, one - block);
  return (head + block * num_blocks) / (num_steps * 5 / 3) * windows;
}

}  // namespace

double estimate_seconds(const Job& job) {
  check_input(job);
  const c10::NoGradGuard no_grad;
  // What a window adds is measured apart from what a block takes whatever their number.
  constexpr int64_t kFewWindows = 4;
  Job quiet = job;
  quiet.model = stored_model(job);  // opened once
  quiet.progress = {};
  quiet.options.activations_directory.clear();
  quiet.options.communicator = {};  // what one process alone would take
  quiet.recipe.shards = 1;
  const auto block_with = [&](int64_t num_windows) {
    if (job.windows.defined()) quiet.windows = job.windows.narrow(0, 0, num_windows);
    return time_first_block(quiet);
  };
  double block = 0;
  const int64_t n = job.windows.defined() ? job.windows.size(0) : 0;
  if (n <= kFewWindows) {
    block = block_with(n);
  } else {
    const double few = block_with(kFewWindows), one = block_with(1);  // the first of them reads the file
    block = one + std::max(0.0, few - one) / (kFewWindows - 1) * static_cast<double>(n - 1);
  }
  quiet.windows = job.windows;
  const double blocks = block * static_cast<double>(std::get<StoredModel>(quiet.model).config.num_hidden_layers);
  return blocks + (n > 0 ? time_model_passes(quiet) : 0);
}

}  // namespace baseq

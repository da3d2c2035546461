#include "pipeline/divided_run.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <zlib.h>

#include <algorithm>
#include <bit>

#include "cluster/messages.h"
#include "starts.h"

namespace baseq {
namespace {

using nlohmann::json;

/// A step that looks at all windows in a way that is not divided yet; empty: none does.
std::string undivided_step(const Recipe& recipe) {
  for (const TransformStep& step : recipe.transforms()) {
    if (needs_tokens(step)) return "a permutation or a greedy start";
  }
  return "";
}

uint32_t crc32_of(const Tensor& tensor) {
  const Tensor values = tensor.cpu().contiguous();
  return static_cast<uint32_t>(::crc32_z(0, static_cast<const Bytef*>(values.const_data_ptr()), values.nbytes()));
}

/// The identity of a run, its inputs among it.
json identity_of(const RunJournal::Description& description) {
  json identity = description.identity;
  for (const auto& [name, tensor] : description.inputs) {
    identity["inputs"][name] = {{"shape", tensor.sizes().vec()}, {"hash", crc32_of(tensor)}};
  }
  return identity;
}

}  // namespace

std::optional<std::string> not_divisible(const Job& job) {
  const Recipe& recipe = job.recipe;
  const int64_t size = job.options.communicator.size;
  const std::string who = fmt::format("recipe \"{}\"", recipe.name);
  if (job.windows.defined() && job.windows.size(0) < recipe.shards) {
    return fmt::format(
        "{}: {} calibration windows cannot be cut into {} shards; set `calibration.shards` to {} or less", who,
        job.windows.size(0), recipe.shards, std::bit_floor(static_cast<uint64_t>(job.windows.size(0))));
  }
  if (size == 1) return std::nullopt;
  if (const std::string step = undivided_step(recipe); !step.empty()) {
    return fmt::format("{} has {}, which {} processes cannot share; run it in one process", who, step, size);
  }
  if (!job.windows.defined() || recipe.shards >= size) return std::nullopt;
  return fmt::format(
      "{} has its calibration windows in {}, which {} processes cannot share; set `calibration.shards` to {} (or a "
      "larger power of two, up to the number of windows), with which every number of processes makes the same bytes",
      who, recipe.shards == 1 ? "one piece" : fmt::format("{} shards", recipe.shards), size,
      std::bit_ceil(static_cast<uint64_t>(size)));
}

Shards shards_of(const Job& job) {
  const std::optional<std::string> problem = not_divisible(job);
  TORCH_CHECK(!problem, *problem);
  const Communicator& communicator = job.options.communicator;
  if (!job.windows.defined()) return Shards(communicator);
  return {communicator, job.windows.size(0), job.recipe.shards};
}

void check_same_run(const Communicator& communicator, const RunJournal::Description& description) {
  if (communicator.size == 1) return;
  const json own = identity_of(description);
  std::string problem;
  if (communicator.is_first()) {
    for (int64_t rank = 1; rank < communicator.size; ++rank) {
      const std::vector<std::string> found = differences(own, json::parse(receive_text(communicator, rank)));
      if (found.empty() || !problem.empty()) continue;
      problem = fmt::format("cluster: process {} has another run than process 0; what differs: {}", rank,
                            fmt::join(found, ", "));
    }
  } else {
    send_text(communicator, 0, own.dump());
  }
  problem = broadcast(communicator, problem);
  TORCH_CHECK(problem.empty(), problem);
}

SharedJournal::SharedJournal(const std::filesystem::path& directory, const RunJournal::Description& description,
                             const Shards& shards)
    : shards_(shards) {
  if (communicator().is_first()) journal_.emplace(directory, description);
  num_steps_ = shared(journal_ ? journal_->num_steps() : 0);
}

json SharedJournal::shared(const json& value) const { return json::parse(broadcast(communicator(), value.dump())); }

SharedJournal::Tensors SharedJournal::step(int64_t index) const {
  return broadcast(communicator(), journal_ ? journal_->step(index) : Tensors());
}

json SharedJournal::notes(int64_t index) const { return shared(journal_ ? journal_->notes(index) : json()); }

std::map<std::string, RunJournal::State> SharedJournal::state() const {
  std::map<std::string, RunJournal::State> state;
  if (journal_) state = journal_->state();
  json num_steps = json::object();
  for (const auto& [name, kept] : state) num_steps[name] = kept.num_steps;
  num_steps = shared(num_steps);
  for (const auto& [name, num] : num_steps.items()) {
    state[name] = {shards_.scatter(state[name].tensor), num.get<int64_t>()};
  }
  return state;
}

std::optional<RunJournal::Partial> SharedJournal::partial() const {
  std::optional<RunJournal::Partial> partial;
  if (journal_) partial = journal_->partial();
  if (!shared(partial.has_value()).get<bool>()) return std::nullopt;
  return RunJournal::Partial{broadcast(communicator(), partial ? partial->tensors : Tensors()),
                             shared(partial ? partial->notes : json())};
}

void SharedJournal::finish_step(const Tensors& result, const Tensors& streams, const json& notes) {
  Tensors whole;
  for (const auto& [name, part] : streams) whole[name] = shards_.gather(part);
  if (journal_) journal_->finish_step(result, whole, notes);
  ++num_steps_;
}

void SharedJournal::save_partial(const Tensors& tensors, const json& notes) {
  if (journal_) journal_->save_partial(tensors, notes);
}

}  // namespace baseq

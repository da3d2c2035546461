#include "pipeline/divided_rounding.h"

#include <ATen/ATen.h>

#include <map>

#include "cluster/messages.h"
#include "cluster/owners.h"

namespace baseq {
namespace {

/// The process that rounds each linear.
std::map<std::string, int64_t> owners_of(const std::vector<std::string>& names, OpenBlock& block,
                                         int64_t num_processes) {
  std::vector<int64_t> work;
  for (const std::string& name : names) work.push_back(block.layer().linear(name).weight.numel());
  const std::vector<int64_t> by_number = owners_by_work(work, num_processes);
  std::map<std::string, int64_t> owners;
  for (size_t i = 0; i < names.size(); ++i) owners[names[i]] = by_number[i];
  return owners;
}

/// What its owner gives, for all processes.
RoundedLinear shared(const RoundedLinear& own, const std::string& name, int64_t owner, const BlockTask& task) {
  const Communicator& communicator = task.inputs.pass.shards.communicator();
  nlohmann::json events = nlohmann::json::array();
  for (const ProgressEvent& event : own.events) events.push_back(to_json(event));
  const auto tensors = broadcast(communicator, state_tensors({.weights = {{name, own.state}}}), owner);
  events = nlohmann::json::parse(broadcast(communicator, events.dump(), owner));
  if (communicator.rank == owner) return own;
  BlockState state = state_from_tensors(tensors, task.grids, task.place.compute.device());
  RoundedLinear result{.state = std::move(state.weights.at(name))};
  for (const nlohmann::json& event : events) {
    if (auto known = progress_event_from_json(event, "cluster")) result.events.push_back(std::move(*known));
  }
  return result;
}

}  // namespace

void round_divided(const std::vector<std::string>& names, OpenBlock& block, const BlockTask& task,
                   const std::function<RoundedLinear(const std::string& name)>& round) {
  const Communicator& communicator = task.inputs.pass.shards.communicator();
  const auto tell = [&](const RoundedLinear& rounded) {
    for (const ProgressEvent& event : rounded.events) task.tell(event);
  };
  if (communicator.size == 1) {
    for (const std::string& name : names) tell(round(name));
    return;
  }
  const std::map<std::string, int64_t> owners = owners_of(names, block, communicator.size);
  std::map<std::string, RoundedLinear> rounded;
  for (const std::string& name : names) {
    if (owners.at(name) == communicator.rank) rounded[name] = round(name);
  }
  for (const std::string& name : names) {
    const RoundedLinear result = shared(rounded[name], name, owners.at(name), task);
    if (owners.at(name) != communicator.rank) block.round(name, result.state);
    tell(result);
  }
}

}  // namespace baseq

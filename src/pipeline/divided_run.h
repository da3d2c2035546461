#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>

#include "baseq/pipeline/job.h"
#include "cluster/shards.h"
#include "io/run_journal.h"

namespace baseq {

// What a run of several processes needs besides the work on blocks. One process alone passes through all of it as if it
// were not there.

/// Why a job cannot be divided as its recipe says, and among its processes: a sentence; nothing where it can.
std::optional<std::string> not_divisible(const Job& job);

/// The windows of this process. Throws c10::Error with not_divisible().
Shards shards_of(const Job& job);

/// Throws c10::Error in all processes when one of them has another run than the first, naming it and what differs.
void check_same_run(const Communicator& communicator, const RunJournal::Description& description);

/// The journal of a run, which the first process keeps. All of them call the same functions in the same order; they all
/// get what it holds, and of streams their own part.
class SharedJournal {
 public:
  using Tensors = RunJournal::Tensors;

  /// `shards` must outlive this. See RunJournal.
  SharedJournal(const std::filesystem::path& directory, const RunJournal::Description& description,
                const Shards& shards);

  int64_t num_steps() const { return num_steps_; }
  Tensors step(int64_t index) const;
  nlohmann::json notes(int64_t index) const;
  std::map<std::string, RunJournal::State> state() const;
  std::optional<RunJournal::Partial> partial() const;
  /// @param streams the parts of this process
  void finish_step(const Tensors& result, const Tensors& streams, const nlohmann::json& notes);
  void save_partial(const Tensors& tensors, const nlohmann::json& notes);

 private:
  const Communicator& communicator() const { return shards_.communicator(); }
  nlohmann::json shared(const nlohmann::json& value) const;

  const Shards& shards_;
  std::optional<RunJournal> journal_;  ///< of the first process
  int64_t num_steps_ = 0;
};

}  // namespace baseq

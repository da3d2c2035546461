#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "baseq/tensor.h"

namespace baseq {

/// A long run in a directory, step by step, so that a later process can go on with it. Every file is written beside,
/// synced and renamed, and counts only once the journal names it with its size and CRC-32: whenever a process dies,
/// what the journal holds is whole.
///
///     run.json            identity, details, and checksums of itself and the inputs
///     inputs.safetensors  what the run was given
///     step-N.safetensors  what step N made
///     state-N.safetensors what the first N steps leave for the next one; only the newest is kept
///     journal.json        the finished steps
class RunJournal {
 public:
  using Tensors = std::map<std::string, Tensor>;
  struct Description {
    nlohmann::json identity;  ///< object; what the result depends on
    nlohmann::json details;   ///< whatever else a later process wants to know
    Tensors inputs;
  };

  /// Starts a run in `directory` (made when missing), or opens the one that is there.
  /// Throws c10::Error when the run there has another identity or other inputs (naming what differs), when a file is
  /// missing or damaged, when the directory holds something else, or another process works in it.
  RunJournal(const std::filesystem::path& directory, const Description& description);
  ~RunJournal();
  RunJournal(const RunJournal&) = delete;
  RunJournal& operator=(const RunJournal&) = delete;

  /// What a run was started with. Throws c10::Error when `directory` holds none.
  static Description describe(const std::filesystem::path& directory);

  int64_t num_steps() const { return static_cast<int64_t>(steps_.size()); }
  Tensors step(int64_t index) const;  ///< mapped, read-only; see SafetensorsFile::tensor
  Tensors state() const;              ///< of the last finished step; empty before the first
  /// What finish_step was told of a step; null for nothing.
  const nlohmann::json& notes(int64_t index) const { return notes_.at(static_cast<size_t>(index)); }
  /// Makes the next step durable.
  /// @param notes kept in the journal itself; small, and no part of the run's identity
  void finish_step(const Tensors& result, const Tensors& state, const nlohmann::json& notes = {});

 private:
  struct File {
    std::string name;
    int64_t num_bytes = 0;
    uint32_t crc32 = 0;
  };
  File save(const std::string& name, const Tensors& tensors) const;
  Tensors load(const File& file) const;
  void read_journal();
  void write_journal() const;

  std::filesystem::path directory_;
  int lock_ = -1;
  std::vector<File> steps_;
  std::vector<nlohmann::json> notes_;  ///< of the steps
  File state_;
};

}  // namespace baseq

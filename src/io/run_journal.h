#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "baseq/tensor.h"
#include "io/lock_file.h"

namespace baseq {

/// CRC-32 of the bytes of a regular file (links are followed). Throws c10::Error naming what cannot be read.
uint32_t crc32_of_file(const std::filesystem::path& path);

/// "recipe/weights/num_bits (4, now 3)" for every value that is not the same in both objects.
std::vector<std::string> differences(const nlohmann::json& was, const nlohmann::json& is);

/// A long run in a directory, step by step, so that a later process can go on with it. Every file is written beside,
/// synced and renamed, and counts only once the journal names it with its size and CRC-32: whenever a process dies,
/// what the journal holds is whole.
///
///     run.json                 identity, details, and checksums of itself and the inputs
///     inputs.safetensors       what the run was given
///     step-N.safetensors       what step N made
///     state-N-NAME.safetensors what the first N steps leave for the next one; of each name only the newest is kept
///     partial-N-K.safetensors  what step N has reached; only the newest is kept, until the step is finished
///     journal.json             the finished steps, what the next one has reached, and a checksum of itself
class RunJournal {
 public:
  using Tensors = std::map<std::string, Tensor>;
  struct Description {
    nlohmann::json identity;  ///< object; what the result depends on
    nlohmann::json details;   ///< whatever else a later process wants to know; those of the last one are kept
    Tensors inputs;
  };
  /// How far a step has come that is not finished.
  struct Partial {
    Tensors tensors;
    nlohmann::json notes;
  };

  /// Starts a run in `directory` (made when missing), or opens the one that is there.
  /// Throws c10::Error when the run there has another identity or other inputs (naming what differs), when a file is
  /// missing or damaged, when the directory holds something else or the run of another version of this program, or when
  /// another process works in it.
  RunJournal(const std::filesystem::path& directory, const Description& description);
  RunJournal(const RunJournal&) = delete;
  RunJournal& operator=(const RunJournal&) = delete;

  /// Whether `directory` holds a run.
  static bool exists(const std::filesystem::path& directory);
  /// Whether some process works in `directory` now.
  static bool is_held(const std::filesystem::path& directory);
  /// What a run was started with. Throws c10::Error when `directory` holds none that this version can read.
  static Description describe(const std::filesystem::path& directory);

  int64_t num_steps() const { return static_cast<int64_t>(steps_.size()); }
  Tensors step(int64_t index) const;  ///< mapped, read-only; see SafetensorsFile::tensor
  struct State {
    Tensor tensor;          ///< as those of step()
    int64_t num_steps = 0;  ///< how many had been finished by then
  };
  /// By name, what the steps have left; empty before the first.
  std::map<std::string, State> state() const;
  /// What finish_step was told of a step; null for nothing.
  const nlohmann::json& notes(int64_t index) const { return notes_.at(static_cast<size_t>(index)); }
  /// Makes the next step durable.
  /// @param state takes the place of what earlier steps left under the same names, which are plain file names; other
  ///              names keep what they have
  /// @param notes kept in the journal itself; small, and no part of the run's identity
  void finish_step(const Tensors& result, const Tensors& state, const nlohmann::json& notes = {});

  /// What the next step has reached; nothing when it has not been begun. Tensors as those of step().
  std::optional<Partial> partial() const;
  /// Makes what the next step has reached durable, in place of what it had reached before.
  /// @param notes small, as those of finish_step
  void save_partial(const Tensors& tensors, const nlohmann::json& notes);

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
  void remove_leftovers() const;

  std::filesystem::path directory_;
  std::optional<LockFile> lock_;
  std::vector<File> steps_;
  std::vector<nlohmann::json> notes_;  ///< of the steps
  struct StateFile {
    File file;
    int64_t num_steps;
  };
  std::map<std::string, StateFile> state_;
  std::optional<File> partial_;
  nlohmann::json partial_notes_;
  int64_t num_partials_ = 0;  ///< of the next step, so far
};

}  // namespace baseq

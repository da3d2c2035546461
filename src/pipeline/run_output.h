#pragma once

#include <optional>
#include <string>
#include <vector>

#include "baseq/io/checkpoint.h"
#include "run_description.h"

namespace baseq {

/// Writes the checkpoint of a run, see CheckpointWriter. Of several processes the first one does; in the others all of
/// this does nothing.
class RunOutput {
 public:
  /// Throws c10::Error when the run cannot write where it is asked to.
  static void check_place(const Job& job) {
    if (!writes(job)) return;
    const std::vector<std::string> obstacles = find_obstacles(job);
    TORCH_CHECK(obstacles.empty(), obstacles.front());
  }

  explicit RunOutput(const Job& job) {
    if (writes(job)) writer_.emplace(job.output, writer_options(job));
  }

  void expect(const std::vector<CheckpointWriter::Expected>& tensors) {
    if (writer_) writer_->expect(tensors);
  }
  void add(const std::string& name, const Tensor& tensor) {
    if (writer_) writer_->add(name, tensor);
  }
  void write_file(const std::string& name, std::string_view content) {
    if (writer_) writer_->write_file(name, content);
  }
  void copy_side_files(const std::filesystem::path& source) {
    if (writer_) writer_->copy_side_files(source);
  }
  void finish(const nlohmann::json& config) {
    if (writer_) writer_->finish(config);
  }

 private:
  static bool writes(const Job& job) { return job.options.communicator.is_first(); }

  std::optional<CheckpointWriter> writer_;
};

}  // namespace baseq

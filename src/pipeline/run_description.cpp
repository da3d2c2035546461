#include "run_description.h"

#include <ATen/Parallel.h>

#include <chrono>

#include "../io/partial_directory.h"
#include "baseq/io/apart.h"
#include "baseq/model/modeling_source.h"
#include "baseq/model/quantization_config.h"
#include "baseq/pipeline/run_log.h"
#include "instruction_set.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

int64_t modified(const fs::path& file) {
  const auto time = fs::last_write_time(file).time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

}  // namespace

RunJournal::Description describe_run(const Checkpoint& checkpoint, const Recipe& recipe, const Tensor& windows,
                                     const fs::path& output, const QuantizeOptions& options) {
  const std::string path = fs::absolute(checkpoint.path()).string();
  json known_files = json::object(), known_times = json::object();
  if (RunJournal::exists(options.work_directory)) {
    const RunJournal::Description known = RunJournal::describe(options.work_directory);
    if (known.details.value("model", "") == path) {
      known_files = known.identity.value("model", json::object());
      known_times = known.details.value("modified", json::object());
    }
  }
  json files = json::object(), times = json::object();
  for (const std::string& name : checkpoint.files()) {
    const fs::path file = checkpoint.path() / name;
    times[name] = modified(file);
    files[name] = {{"bytes", fs::file_size(file)}};
    const json known = known_files.value(name, json::object());
    const bool same =
        known.value("bytes", json()) == files[name]["bytes"] && known_times.value(name, json()) == times[name];
    files[name]["crc32"] = same ? known.value("crc32", json()) : json(crc32_of_file(file));
  }
  RunJournal::Description description{.identity = {{"version", version()},
                                                   {"format_version", QuantizationConfig::kFormatVersion},
                                                   {"model", files},
                                                   {"recipe", recipe.to_json()},
                                                   {"seed", options.seed},
                                                   {"device", options.device.str()},
                                                   {"threads", at::get_num_threads()},
                                                   {"instruction_set", instruction_set()},
                                                   {"tokens_per_batch", options.tokens_per_batch}},
                                      .details = {{"model", path},
                                                  {"modified", times},
                                                  {"output", fs::absolute(output).string()},
                                                  {"shard_bytes", options.output.shard_bytes},
                                                  {"force", options.output.force},
                                                  {"activations_directory", options.activations_directory.string()}},
                                      .inputs = {}};
  if (windows.defined()) description.inputs["input_ids"] = windows;
  return description;
}

StoredRun read_stored_run(const fs::path& work_directory) {
  const RunJournal::Description description = RunJournal::describe(work_directory);
  const auto& [identity, details, inputs] = description;
  try {
    StoredRun run;
    run.model = details.at("model").get<std::string>();
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
  } catch (const json::exception& error) {
    TORCH_CHECK(false, work_directory.string(), ": run.json does not describe a quantization: ", error.what());
  }
}

std::set<std::string> own_files() { return {kModelingFile, kRunLogFile, "README.md", "adapter"}; }

CheckpointWriter::Options writer_options(const fs::path& model, const QuantizeOptions& options) {
  CheckpointWriter::Options result = options.output;
  result.source = model;
  result.own_files = own_files();
  return result;
}

std::vector<std::string> find_obstacles(const fs::path& model, const fs::path& output, const QuantizeOptions& options) {
  std::vector<std::string> found;
  const auto attempt = [&](const auto& step) {
    try {
      step();
    } catch (const c10::Error& error) {
      found.emplace_back(error.what_without_backtrace());
    }
  };
  const fs::path& work = options.work_directory;
  if (!work.empty() && RunJournal::is_held(work)) {
    found.push_back(work.string() + ": another process works in this directory");
  }
  attempt([&] { CheckpointWriter::check_place(output, writer_options(model, options)); });
  if (work.empty()) return found;
  attempt([&] { check_apart(work, model); });
  if (lies_in(work, output) || lies_in(work, PartialDirectory::path_of(output)) || lies_in(output, work)) {
    found.push_back(work.string() + ": the work directory and the output " + output.string() +
                    " lie in one another; choose two directories apart");
  }
  return found;
}

}  // namespace baseq

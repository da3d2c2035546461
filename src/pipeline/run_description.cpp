#include "run_description.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <chrono>

#include "baseq/model/stored_model.h"
#include "cluster/shards.h"
#include "formats/model_card.h"
#include "formats/native/modeling_source.h"
#include "io/apart.h"
#include "io/partial_directory.h"
#include "pipeline/run_log.h"
#include "quant/instruction_set.h"
#include "quant/matmul_precision.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

int64_t modified(const fs::path& file) {
  const auto time = fs::last_write_time(file).time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

at::ScalarType dtype_of(const Checkpoint& checkpoint) {
  for (const char* name : {"model.embed_tokens.weight", "embed_tokens.weight"}) {
    if (checkpoint.contains(name)) return checkpoint.info(name).dtype;
  }
  return at::kBFloat16;
}

}  // namespace

StoredModel stored_model(const Job& job) {
  if (const auto* path = std::get_if<fs::path>(&job.model)) return Checkpoint(*path);
  return std::get<StoredModel>(job.model);
}

fs::path model_path(const Job& job) {
  if (const auto* path = std::get_if<fs::path>(&job.model)) return *path;
  return std::get<StoredModel>(job.model).tensors.path();
}

RunShape shape_of(const Job& job, const Checkpoint& checkpoint) {
  RunShape shape{.tokens_per_batch = job.options.tokens_per_batch,
                 .activations_on_disk = !job.options.activations_directory.empty(),
                 .on_device = !job.options.device.is_cpu(),
                 .checkpoint_dtype = dtype_of(checkpoint)};
  if (job.windows.defined() || job.recipe.needs_calibration()) {
    shape.num_windows = job.windows.defined() ? job.windows.size(0) : job.recipe.num_samples;
    shape.seq_len = job.windows.defined() ? job.windows.size(1) : job.recipe.seq_len;
  }
  const int64_t num_shards = job.recipe.shards;
  Communicator communicator = job.options.communicator;
  if (num_shards < communicator.size || shape.num_windows < num_shards) return shape;  // no run will come of it
  int64_t most = 0;
  for (communicator.rank = 0; communicator.rank < communicator.size; ++communicator.rank) {
    most = std::max(most, Shards(communicator, shape.num_windows, num_shards).num_own_windows());
  }
  shape.num_elsewhere = shape.num_windows - most;
  // Of the subtrees that lie side by side, each twice as large as the next, the shard that is being added, and what
  // another process sends.
  const auto most_shards = static_cast<uint64_t>((num_shards + communicator.size - 1) / communicator.size);
  shape.num_sums = std::max<int64_t>(std::bit_width(most_shards - 1) + 1, communicator.size > 1 ? 2 : 1);
  shape.gathers_streams = communicator.size > 1 && !job.options.work_directory.empty();
  return shape;
}

std::string needs_windows(const Recipe& recipe) { return "recipe \"" + recipe.name + "\" needs calibration `windows`"; }

RunJournal::Description describe_run(const Job& job, const Checkpoint& checkpoint, const Recipe& recipe) {
  const QuantizeOptions& options = job.options;
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
                                                  {"output", fs::absolute(job.output).string()},
                                                  {"shard_bytes", options.output.shard_bytes},
                                                  {"force", options.output.force},
                                                  {"activations_directory", options.activations_directory.string()}},
                                      .inputs = {}};
  if (recipe.matmul_precision != MatmulPrecision::kHighest) {
    // Depends on LibTorch as well as on the processor.
    const at::ScalarType factors = factor_dtype(recipe.matmul_precision, options.device);
    description.identity["product_factors"] = c10::toString(factors);
  }
  if (job.windows.defined()) description.inputs["input_ids"] = job.windows;
  return description;
}

StoredRun read_stored_run(const fs::path& work_directory) {
  const RunJournal::Description description = RunJournal::describe(work_directory);
  const auto& [identity, details, inputs] = description;
  try {
    StoredRun run;
    Job& job = run.job;
    job.model = fs::path(details.at("model").get<std::string>());
    job.output = details.at("output").get<std::string>();
    job.recipe = Recipe::from_json(identity.at("recipe"), (work_directory / "run.json").string() + ": recipe");
    if (const auto it = inputs.find("input_ids"); it != inputs.end()) job.windows = it->second;
    job.options.device = at::Device(identity.at("device").get<std::string>());
    job.options.seed = identity.at("seed").get<uint64_t>();
    job.options.output.shard_bytes = details.at("shard_bytes").get<int64_t>();
    job.options.output.force = details.at("force").get<bool>();
    job.options.activations_directory = details.at("activations_directory").get<std::string>();
    job.options.work_directory = work_directory;
    job.options.tokens_per_batch = identity.value("tokens_per_batch", kTokensPerBatch);
    run.num_threads = identity.at("threads").get<int64_t>();
    return run;
  } catch (const json::exception& error) {
    TORCH_CHECK(false, work_directory.string(), ": run.json does not describe a quantization: ", error.what());
  }
}

std::set<std::string> own_files() { return {kModelingFile, kRunLogFile, kCardFile, "adapter"}; }

CheckpointWriter::Options writer_options(const Job& job) {
  CheckpointWriter::Options result = job.options.output;
  result.source = model_path(job);
  result.own_files = own_files();
  return result;
}

std::vector<std::string> find_obstacles(const Job& job) {
  std::vector<std::string> found;
  const auto attempt = [&](const auto& step) {
    try {
      step();
    } catch (const c10::Error& error) {
      found.emplace_back(error.what_without_backtrace());
    }
  };
  const fs::path &work = job.options.work_directory, &output = job.output;
  if (!work.empty() && RunJournal::is_held(work)) {
    found.push_back(work.string() + ": another process works in this directory");
  }
  attempt([&] { CheckpointWriter::check_place(output, writer_options(job)); });
  if (work.empty()) return found;
  attempt([&] { check_apart(work, model_path(job)); });
  if (lies_in(work, output) || lies_in(work, PartialDirectory::path_of(output)) || lies_in(output, work)) {
    found.push_back(work.string() + ": the work directory and the output " + output.string() +
                    " lie in one another; choose two directories apart");
  }
  return found;
}

}  // namespace baseq

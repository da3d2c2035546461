#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include "baseq/cluster/communicator.h"
#include "baseq/io/checkpoint.h"
#include "baseq/model/stored_model.h"
#include "baseq/pipeline/recipe.h"

#pragma GCC visibility push(default)
namespace baseq {

/// What a run tells its caller, in the order of events:
///
///     job.progress = [](const ProgressEvent& event) {
///       if (const auto* linear = std::get_if<LinearRounded>(&event)) std::puts(linear->name.c_str());
///     };
struct RunStarted {
  std::string model;  ///< name of the checkpoint's directory
  int64_t num_blocks = 0;
  int64_t num_samples = 0, seq_len = 0;  ///< calibration windows and tokens in each; 0: none
  uint64_t seed = 0;
  std::string device;
  int64_t num_threads = 0;
};
struct RunResumed {
  int64_t num_finished, num_blocks;  ///< the finished ones come from the work directory
  std::string stage{};               ///< of the block behind them, also from there: the last one it finished; or empty
};
/// In place of the number of a block: a step over the whole model.
inline constexpr int64_t kWholeModel = -1;
struct BlockStarted {
  int64_t block, num_blocks;
  int64_t pass = 0;  ///< of the recipe, which takes each block once per pass
};
struct LinearRounded {
  int64_t block;
  std::string name;       ///< "self_attn.q_proj"
  double relative_error;  ///< of its output over the calibration inputs; of its weight without calibration
  double damping;
  double seconds;
};
struct EpochLearned {
  int64_t block;
  std::string stage;
  int64_t epoch, num_epochs;  ///< from 1
  double loss;                ///< over the monitored windows
};
struct StageLearned {
  int64_t block;
  std::string stage;
  double loss_before, loss_after;
  double seconds;
};
/// Values at a quant point. A row is what one scale covers: a token, or a token and head of the cache.
struct ActivationRange {
  double min = 0, max = 0;
  double rms = 0;
  double peak =
      0;  ///< mean over rows of max|x| / rms(x): 1 for a row of equal magnitudes, sqrt(row size) for one spike
  /// Standard deviation over channels of the norm of a channel over tokens, arXiv 2506.01967: 0 where all channels are
  /// equally loud. NaN: unknown, in an older log.
  double difficulty = 0;
};
/// A quant point of a block that is done: ranges over about 2048 calibration tokens, and what was chosen or learned.
struct PointMeasured {
  int64_t block;
  std::string name;                                           ///< "mlp.down_proj.input_quant"
  ActivationRange before;                                     ///< in the original block, at the same place
  ActivationRange after;                                      ///< what the grid is given: transformed, gain * x - shift
  bool enabled = false;                                       ///< whether there is a grid
  std::vector<double> clip{};                                 ///< ratios, flattened; empty: the full range
  std::optional<double> min_gain{}, max_gain{}, max_shift{};  ///< over the channels; largest |shift|
};
/// What a choose step kept at a site.
struct TransformChosen {
  int64_t block;
  std::string site;
  int64_t chosen;                ///< index in ChooseStep::from
  std::string chain;             ///< its kinds, such as "smooth, hadamard"; "none" for an empty one
  std::vector<double> scores{};  ///< of every chain; of ChooseStep::By::kRms the root mean square alone
};
struct BlockFinished {
  int64_t block, num_blocks;  ///< kWholeModel: a pass over the model
  double
      relative_error;  ///< median over tokens of |quantized - full|^2 / |full|^2 of the block's output; NaN if unknown
  double seconds;
  int64_t peak_memory_bytes = 0;  ///< of the process so far
};
struct Warning {
  std::string message;
};
struct RunFinished {
  double seconds;  ///< of this process
};
using ProgressEvent = std::variant<RunStarted, RunResumed, BlockStarted, LinearRounded, EpochLearned, StageLearned,
                                   PointMeasured, BlockFinished, Warning, RunFinished, TransformChosen>;
using ProgressFn = std::function<void(const ProgressEvent&)>;

/// An object with "event" ("block_finished") and the fields of the event; NaN and infinities become null.
nlohmann::json to_json(const ProgressEvent& event);
/// Reads what to_json wrote; nothing for an event of a kind it does not know. Throws c10::Error naming `path` and key.
std::optional<ProgressEvent> progress_event_from_json(const nlohmann::json& json, const std::string& path);

/// Highest resident memory of this process so far.
int64_t peak_memory_bytes();

/// Tokens in a batch of a forward pass, in whole windows: enough for efficient matrix products, little next to a
/// block's weights. Smaller batches use less memory but change the summation order, and with it the last bits of the
/// result.
inline constexpr int64_t kTokensPerBatch = 2048;

/// How a job is done. Only `device`, `seed` and `tokens_per_batch` change the bytes of the result.
struct QuantizeOptions {
  at::Device device = at::kCPU;
  uint64_t seed = 0;  ///< of calibration_windows() and of the order in which learning visits the windows
  /// Directory of the mapped files that hold the activation streams; empty: they stay in memory.
  std::filesystem::path activations_directory{};
  int64_t tokens_per_batch = kTokensPerBatch;
  /// Bytes of the memory of a `device` other than the CPU that may be used; 0: what is free there. The activation
  /// streams live there where they fit, else on the host.
  int64_t device_memory = 0;
  CheckpointWriter::Options output{};  ///< size of the shards, whether an existing checkpoint is replaced
  /// Keeps finished blocks, finished stages of the next one and the streams. A job that finds its own continues it, to
  /// the same bytes. Empty: nothing is kept.
  std::filesystem::path work_directory{};
  /// Asked before each step of a block (a batch, a linear, a step of learning); true ends the run with Interrupted.
  /// What the work directory holds by then is kept: the blocks before, and this one up to the stage that it has
  /// finished. May be empty.
  std::function<bool()> should_stop{};
  /// Of several processes that share the work, each of which calls quantize() with the same job. The windows are
  /// divided as `shards` of the recipe allows. Only the first one writes, and tells of the progress.
  Communicator communicator{};
};

/// What to quantize, how, and where the result goes. Everything that plans, measures or quantizes takes one:
///
///     Job job{.model = "SmolLM2-135M-Instruct", .recipe = Recipe::read("gptq-w4a16-g64"), .output = "out"};
///     job.windows = calibration_windows("calibration.txt", job);
///     job.progress = [](const ProgressEvent& event) { /* std::get_if<BlockFinished>(&event) */ };
///     if (plan(job).problems.empty()) quantize(job);
struct Job {
  std::variant<std::filesystem::path, StoredModel> model{};  ///< an original checkpoint: its directory, or open
  Recipe recipe{};
  Tensor windows{};  ///< integers [num_samples, seq_len]; undefined for a recipe that needs none
  std::filesystem::path output{};
  QuantizeOptions options{};
  ProgressFn progress{};  ///< may be empty; what it throws ends the run
};

/// Calibration windows of a file as the job's recipe asks for them, tokenized as its model does: int64 [num_samples,
/// seq_len]. Texts (UTF-8, or .jsonl with a "text" per line) are cut at random positions that the seed chooses; of a
/// .safetensors file with windows `input_ids` the first ones are taken.
/// Throws c10::Error naming the file when it is too short, no text, or the model has no tokenizer.
Tensor calibration_windows(const std::filesystem::path& file, const Job& job);

/// The memory or disk space of a run by parts, in bytes. An estimate: it counts the large tensors.
struct Footprint {
  struct Part {
    std::string what;
    int64_t bytes = 0;
  };
  std::vector<Part> parts;

  int64_t bytes() const;  ///< of all parts
};

/// A forecast of quantize(job).
struct RunPlan {
  std::vector<std::string> problems;  ///< each a sentence; one is enough to end the run
  std::vector<std::string> warnings;
  Footprint memory;         ///< of the host
  Footprint device_memory;  ///< of a device other than the CPU; without parts on the CPU
  /// Bytes that will be written, by directory.
  std::vector<Footprint::Part> disk;
  int64_t num_blocks = 0;
};

/// Looks for everything that would end the run sooner or later, without working: a checkpoint that cannot be opened or
/// is quantized already, tensors that are missing, of another shape, not finite or not used, sizes without a Hadamard
/// matrix, groups that do not divide, windows that are missing, token ids that the model does not know, an output that
/// exists or cannot be written, too little room on the disks or in the memory of a GPU. Warnings also say what of the
/// checkpoint the output does not get. Reads every weight once.
///
///     for (const std::string& problem : plan(job).problems) std::puts(problem.c_str());
///
/// Where the recipe needs windows and there are none, memory and disk are those of the recipe's own numbers.
RunPlan plan(const Job& job);

/// Settings outside the recipe that determine memory use.
struct MemoryChoice {
  int64_t tokens_per_batch = kTokensPerBatch;
  bool activations_on_disk = false;
  int64_t bytes = 0;  ///< needed, as estimated
};
/// The first of the possible choices that fits a budget.
struct MemoryFit {
  std::optional<MemoryChoice> choice;
  MemoryChoice smallest;  ///< the one that needs least, whether it fits or not
};
/// Full batches and streams in memory where `budget` bytes allow it, else streams on disk, then ever smaller batches.
/// Throws c10::Error when the recipe is not valid or the model cannot be opened.
MemoryFit fit_memory(const Job& job, int64_t budget);

/// QuantizeOptions::should_stop ended a run.
struct Interrupted : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Quantizes a Hugging Face checkpoint into a native one, block by block: at any time one block's weights and the
/// activation streams (two, and the block's full-precision output) are held. See Job for an example; plan() says
/// beforehand what would go wrong.
/// Throws c10::Error when the recipe is not valid, the checkpoint is already quantized, the recipe needs windows and
/// has none, the output exists, or the work directory holds a run with another model, recipe, windows, seed or number
/// of threads. The output directory appears only when it is complete.
void quantize(const Job& job);

/// Seconds that quantize(job) would take, from its first block: quantized with one window and with a few, without
/// writing anything. Throws as quantize() does.
double estimate_seconds(const Job& job);

/// A run as its work directory describes it: all that continuing it takes.
struct StoredRun {
  Job job{};
  int64_t num_threads = 1;  ///< the bytes of the result depend on it
};
/// The run that QuantizeOptions::work_directory of an earlier job holds; quantize(stored.job) continues it.
/// Throws c10::Error when there is none.
StoredRun read_stored_run(const std::filesystem::path& work_directory);

}  // namespace baseq
#pragma GCC visibility pop

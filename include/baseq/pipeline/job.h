#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
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
///     job.progress = on_events([](const LinearRounded& linear) { std::puts(linear.name.c_str()); },
///                              [](const Warning& warning) { std::puts(warning.message.c_str()); });
struct RunStarted {
  std::string model{};  ///< name of the checkpoint's directory
  int64_t num_blocks = 0;
  int64_t num_samples = 0, seq_len = 0;  ///< calibration windows and tokens in each; 0: none
  uint64_t seed = 0;
  std::string device{};
  int64_t num_threads = 0;
};
struct RunResumed {
  int64_t num_finished = 0, num_blocks = 0;  ///< the finished ones come from the work directory
  std::string stage{};                       ///< the last one that the next block finished, if any
};
/// In place of the number of a block: a step over the whole model.
inline constexpr int64_t kWholeModel = -1;
struct BlockStarted {
  int64_t block = 0, num_blocks = 0;
  int64_t pass = 0;  ///< of the recipe, which takes each block once per pass
};
struct LinearRounded {
  int64_t block = 0;
  std::string name{};         ///< "self_attn.q_proj"
  double relative_error = 0;  ///< of squares, of its output for the calibration inputs; without these of its weight
  double damping = 0;
  double seconds = 0;
};
struct EpochLearned {
  int64_t block = 0;
  std::string stage{};
  int64_t epoch = 0, num_epochs = 0;  ///< from 1
  double loss = 0;                    ///< over the monitored windows
};
struct StageLearned {
  int64_t block = 0;
  std::string stage{};
  double loss_before = 0, loss_after = 0;
  double seconds = 0;
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
  int64_t block = 0;
  std::string name{};                                         ///< "mlp.down_proj.input_quant"
  ActivationRange before{};                                   ///< in the original block, at the same place
  ActivationRange after{};                                    ///< what the grid is given: transformed, gain * x - shift
  bool enabled = false;                                       ///< whether there is a grid
  std::vector<double> clip{};                                 ///< ratios, flattened; empty: the full range
  std::optional<double> min_gain{}, max_gain{}, max_shift{};  ///< over the channels; largest |shift|
};
/// What a choose step kept at a site.
struct TransformChosen {
  int64_t block = 0;
  std::string site{};
  int64_t chosen = 0;            ///< index in ChooseStep::from
  std::string chain{};           ///< its kinds, such as "smooth, hadamard"; "none" for an empty one
  std::vector<double> scores{};  ///< of every chain; of ChooseStep::By::kRms the root mean square alone
};
struct BlockFinished {
  int64_t block = 0, num_blocks = 0;  ///< kWholeModel: a pass over the model
  double relative_error =
      0;  ///< median over tokens of |quantized - full|^2 / |full|^2 of the block's output; NaN if unknown
  double seconds = 0;
  int64_t peak_memory_bytes = 0;  ///< of the process so far
};
struct Warning {
  std::string message{};
};
struct RunFinished {
  double seconds = 0;  ///< of this process
};
using ProgressEvent = std::variant<RunStarted, RunResumed, BlockStarted, LinearRounded, EpochLearned, StageLearned,
                                   PointMeasured, BlockFinished, Warning, RunFinished, TransformChosen>;
using ProgressFn = std::function<void(const ProgressEvent&)>;

/// Whether `Fn` takes an event of one of these types.
template <class Fn, class... Events>
constexpr bool takes_one_of(const std::variant<Events...>* /*only its type counts*/) {
  return (std::is_invocable_v<Fn&, const Events&> || ...);
}

/// Hands each event to those of the functions that take its type; most take one.
template <class... Fns>
ProgressFn on_events(Fns... fns) {
  static_assert((takes_one_of<Fns>(static_cast<const ProgressEvent*>(nullptr)) && ...),
                "on_events: each function takes a type of event by value or const reference");
  return [... fns = std::move(fns)](const ProgressEvent& event) mutable {
    const auto hand = [](auto& fn, const auto& each) {
      if constexpr (std::is_invocable_v<decltype(fn), decltype(each)>) fn(each);
    };
    std::visit([&](const auto& each) { (hand(fns, each), ...); }, event);
  };
}

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
  /// For a run on several processes: each calls quantize() with the same job. The windows are divided as `shards` of
  /// the recipe allows. Only the first process writes and reports progress.
  Communicator communicator{};
};

/// What to quantize, how, and where the result goes. Everything that plans, measures or quantizes takes one:
///
///     Job job{.model = "SmolLM2-135M-Instruct", .recipe = Recipe::read("gptq-w4a16-g64"), .output = "out"};
///     job.windows = calibration_windows("calibration.txt", job);
///     job.progress = on_events([](const BlockFinished& block) { std::cout << block.block << std::endl; });
///     if (plan(job).problems.empty()) quantize(job);
struct Job {
  std::variant<std::filesystem::path, StoredModel> model{};  ///< an original checkpoint: its directory, or open
  Recipe recipe{};
  Tensor windows{};  ///< integers [num_samples, seq_len]; undefined for a recipe that needs none
  std::filesystem::path output{};
  QuantizeOptions options{};
  ProgressFn progress{};  ///< may be empty; what it throws ends the run
};

/// Text to calibrate with, from one file or mixed from several:
///
///     const CalibrationData data{.files = {{"wiki.txt", 3}, {"chat.jsonl"}}};
///     job.windows = read_calibration(data, job).windows;
///
/// Files are, by their endings:
/// - `.safetensors`: windows `input_ids` [n, seq_len], of which the first are taken, or the ids of a text [num_tokens],
///   cut at random positions; whatever `split` says;
/// - `.jsonl`: a document per line, its "text", or its "messages" (objects with "role" and "content"), written by the
///   model's chat template with 2024-01-01 where it tells the date;
/// - anything else: UTF-8 text, one document.
struct CalibrationData {
  struct File {
    std::filesystem::path path{};
    double weight = 1;  ///< its share of the windows, relative to the other files
  };
  enum class Split {
    kRandom,   ///< texts are one, joined by an empty line, cut at random positions; files with conversations as kPacked
    kPacked,   ///< documents one after the other, an EOS token after each text, cut without overlap
    kSamples,  ///< the first tokens of one document each; those that are shorter than a window are skipped
  };
  std::vector<File> files{};
  Split split = Split::kRandom;
};

/// What was taken of a file of CalibrationData.
struct CalibrationRead {
  std::filesystem::path file{};
  int64_t documents = 0;  ///< in the file; 0: it holds token ids
  int64_t tokenized = 0;  ///< documents; as many as it took
  int64_t tokens = 0;     ///< of these documents, or in a file of token ids
  int64_t skipped = 0;    ///< of these: conversations without a place in the chat template, too short for kSamples
  std::string why{};      ///< the first of these was skipped, with its line
  int64_t windows = 0;
};
struct CalibrationWindows {
  Tensor windows{};  ///< int64 [num_samples, seq_len]
  std::vector<CalibrationRead> files{};
};

/// Windows as the job's recipe asks for them, tokenized as its model does. The files take turns, as often as their
/// weights say. The seed chooses positions and the order of documents.
/// Throws c10::Error naming the file, and the line, when it is too short, no text, without a share of a window, or the
/// model has no tokenizer, chat template or EOS token that it takes.
CalibrationWindows read_calibration(const CalibrationData& data, const Job& job);

/// Those of one file of weight 1, kRandom.
Tensor calibration_windows(const std::filesystem::path& file, const Job& job);

/// The memory or disk space of a run by parts, in bytes. An estimate: it counts the large tensors.
struct Footprint {
  struct Part {
    std::string what{};
    int64_t bytes = 0;
  };
  std::vector<Part> parts{};

  int64_t bytes() const;  ///< of all parts
};

/// A forecast of quantize(job).
struct RunPlan {
  std::vector<std::string> problems{};  ///< each a sentence; one is enough to end the run
  std::vector<std::string> warnings{};
  Footprint memory{};         ///< of the host
  Footprint device_memory{};  ///< of a device other than the CPU; without parts on the CPU
  /// Bytes that will be written, by directory.
  std::vector<Footprint::Part> disk{};
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
  std::optional<MemoryChoice> choice{};
  MemoryChoice smallest{};  ///< the one that needs least, whether it fits or not
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

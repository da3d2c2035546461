#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "baseq/pipeline/job.h"
#include "evaluation.h"
#include "help.h"
#include "machine_speed.h"
#include "next_step.h"
#include "output_files.h"
#include "progress_display.h"
#include "resident.h"
#include "text_table.h"

namespace baseq::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct BenchArguments {
  CommonOptions common;
  LoadOptions load;
  std::string model;
  std::vector<int64_t> depths{1, 512, 2048}, batches{1, 8};
  int64_t num_tokens = 32, repetitions = 3;
};

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

/// Ids that look like text to caches and embeddings: no value of them matters.
std::vector<int32_t> random_tokens(int64_t count, int64_t vocab_size) {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  uint64_t state = 1;
  for (int32_t& id : ids) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    id = static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(vocab_size));
  }
  return ids;
}

/// Multiplications and additions of the blocks' linears for one token.
double linear_operations(const ModelConfig& config) {
  double weights = 0;
  for (const LinearShape& linear : linear_shapes(config)) {
    weights += static_cast<double>(linear.out_features) * static_cast<double>(linear.in_features);
  }
  return 2 * weights * static_cast<double>(config.num_hidden_layers);
}

/// `batch` sequences, first of `depth` tokens, then a token each at a time.
class Measurement {
 public:
  Measurement(const Decoder& decoder, int64_t depth, int64_t batch, int64_t num_tokens)
      : decoder_(decoder), depth_(depth), batch_(batch), num_tokens_(num_tokens) {
    for (int64_t i = 0; i < batch; ++i) caches_.push_back(decoder.new_cache(depth + num_tokens));
  }

  /// Tokens a second.
  double prefill() {
    constexpr int64_t kTokensPerPass = 512;
    const std::vector<int32_t> ids = random_tokens(depth_, decoder_.config().vocab_size);
    for (KvCache& cache : caches_) cache.truncate(0);
    const auto start = Clock::now();
    for (KvCache& cache : caches_) {
      for (int64_t begin = 0; begin < depth_; begin += kTokensPerPass) {
        const auto count = static_cast<size_t>(std::min(kTokensPerPass, depth_ - begin));
        decoder_.forward(std::span(ids).subspan(static_cast<size_t>(begin), count), cache);
      }
    }
    return static_cast<double>(depth_ * batch_) / seconds_since(start);
  }

  /// Tokens a second of all sequences together, behind prefill().
  double decode() {
    const std::vector<int32_t> ids = random_tokens(num_tokens_, decoder_.config().vocab_size);
    std::vector<KvCache*> caches;
    for (KvCache& cache : caches_) {
      cache.truncate(depth_);
      caches.push_back(&cache);
    }
    const auto start = Clock::now();
    for (const int32_t& id : ids) {
      const std::vector<std::span<const int32_t>> tokens(caches_.size(), std::span(&id, 1));
      decoder_.forward(tokens, caches);
    }
    return static_cast<double>(num_tokens_ * batch_) / seconds_since(start);
  }

  int64_t cache_bytes() const {
    int64_t bytes = 0;
    for (const KvCache& cache : caches_) bytes += cache.bytes();
    return bytes;
  }

 private:
  const Decoder& decoder_;
  int64_t depth_, batch_, num_tokens_;
  std::vector<KvCache> caches_;
};

nlohmann::json measure(const Decoder& decoder, const BenchArguments& arguments, int64_t depth, int64_t batch) {
  Measurement measurement(decoder, depth, batch, arguments.num_tokens);
  double prefill = 0, decode = 0;
  for (int64_t i = 0; i < arguments.repetitions; ++i) prefill = std::max(prefill, measurement.prefill());
  for (int64_t i = 0; i < arguments.repetitions; ++i) decode = std::max(decode, measurement.decode());
  const double passes = decode / static_cast<double>(batch);
  const auto bytes = static_cast<double>(decoder.bytes() + measurement.cache_bytes());
  return {{"depth", depth},
          {"batch", batch},
          {"prefill_tokens_per_second", prefill},
          {"prefill_operations_per_second", prefill * linear_operations(decoder.config())},
          {"decode_tokens_per_second", decode},
          {"decode_bytes_per_second", passes * bytes},
          {"peak_memory_bytes", peak_memory_bytes()}};
}

std::string giga(const nlohmann::json& value) { return show_number(value, 1, 1e-9); }

void print_results(const nlohmann::json& json) {
  std::vector<std::vector<std::string>> rows{
      {"depth", "batch", "prefill tok/s", "GOP/s", "decode tok/s", "GB/s", "peak memory"}};
  for (const nlohmann::json& row : json["measurements"]) {
    rows.push_back({row["depth"].dump(), row["batch"].dump(), show_number(row["prefill_tokens_per_second"], 1),
                    giga(row["prefill_operations_per_second"]), show_number(row["decode_tokens_per_second"], 1),
                    giga(row["decode_bytes_per_second"]), format_bytes(row["peak_memory_bytes"].get<int64_t>())});
  }
  print_text("{}\n\n{}\nthis machine: {} GB/s read, {} GOP/s of 8-bit products, {} threads; weights in memory: {}\n",
             json["model"].get<std::string>(), markdown_table(rows, 0), giga(json["read_bytes_per_second"]),
             giga(json["multiply_operations_per_second"]), json["num_threads"].get<int>(),
             format_bytes(json["weight_bytes"].get<int64_t>()));
}

void run(const BenchArguments& arguments) {
  const at::Device device = apply(arguments.common);
  check_outputs(arguments.common);
  const Model model = opened(arguments.model, device);
  const int64_t most_depth = std::ranges::max(arguments.depths) + arguments.num_tokens;
  check_resident_memory(arguments.model, model, arguments.load, most_depth, std::ranges::max(arguments.batches));
  const Decoder decoder = load_resident(model, arguments.load);
  nlohmann::json json{{"model", arguments.model},
                      {"load",
                       {{"arithmetic", arguments.load.arithmetic == Arithmetic::kInteger ? "integer" : "float"},
                        {"activation_bits", arguments.load.activation_bits}}},
                      {"num_threads", at::get_num_threads()},
                      {"weight_bytes", decoder.bytes()},
                      {"measurements", nlohmann::json::array()}};
  {
    ProgressDisplay display(arguments.common.quiet);
    const auto total = static_cast<int64_t>(arguments.depths.size() * arguments.batches.size());
    for (const int64_t batch : arguments.batches) {
      for (const int64_t depth : arguments.depths) {
        json["measurements"].push_back(measure(decoder, arguments, depth, batch));
        display.step(static_cast<int64_t>(json["measurements"].size()), total, "measurements");
      }
    }
  }
  json["peak_memory_bytes"] = peak_memory_bytes();
  // At the end: what is read for it is not the model's memory.
  json["read_bytes_per_second"] = measure_read_bandwidth();
  const double peak = measure_multiply_peak();
  json["multiply_operations_per_second"] = peak > 0 ? nlohmann::json(peak) : nlohmann::json();
  print_results(json);
  write_json(arguments.common, json);
  say_next(arguments.common.quiet, "baseq generate {} \"Once upon a time\"", shell_word(arguments.model));
}

}  // namespace

void add_bench(CLI::App& app) {
  auto arguments = std::make_shared<BenchArguments>();
  CLI::App* command = app.add_subcommand("bench", "Tokens a second of a model on this machine");
  command
      ->add_option("model", arguments->model,
                   "Checkpoint directory, GGUF file, or org/name in the local Hugging Face cache")
      ->required()
      ->transform(checkpoint_path());
  begin_group(*command, "Measurements");
  command->add_option("--depth", arguments->depths, "Tokens that are there before the first one is written")
      ->capture_default_str()
      ->expected(1, 100)
      ->check(CLI::Range(1, 1 << 24));
  command->add_option("--batch", arguments->batches, "Sequences that are written at a time")
      ->capture_default_str()
      ->expected(1, 100)
      ->check(CLI::Range(1, 4096));
  command->add_option("--num-tokens", arguments->num_tokens, "Tokens written in each sequence")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command
      ->add_option("--repetitions", arguments->repetitions,
                   "Times that reading and writing are measured; the best one counts")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000));
  add_arithmetic_options(*command, arguments->load);
  add_common_options(*command, arguments->common, {.device = true, .threads = true, .quiet = true});
  command->footer("Example:\n  baseq bench out --depth 1 512 960 --batch 1 --threads 1 --json speed.json");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli

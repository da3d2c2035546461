#include "baseq/runtime/generate.h"

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>

#include "baseq/pipeline/job.h"
#include "baseq/runtime/chat_template.h"
#include "evaluation.h"
#include "help.h"
#include "next_step.h"
#include "output_files.h"
#include "resident.h"
#include "standard_streams.h"
#include "stop_signals.h"

namespace baseq::cli {
namespace {

using Clock = std::chrono::steady_clock;

/// A conversation's context where the user names none: models of 128k would not fit their cache.
constexpr int64_t kConversationTokens = 8192;

struct GenerateArguments {
  CommonOptions common;
  LoadOptions load;
  std::string model, file;
  std::optional<std::string> prompt, system;
  bool chat = false;
  int64_t context = 0;  ///< 0: see context_of()
  GenerateOptions generate;
  std::optional<double> temperature, top_p, min_p, repetition_penalty;
  std::optional<int64_t> top_k;

  bool is_conversation() const { return chat && !prompt && file.empty(); }
};

/// How long a model took for its tokens.
struct Timing {
  double prefill_seconds = 0, decode_seconds = 0;
  int64_t decoded = 0;  ///< tokens of decode_seconds; the prompt's pass gives the first one

  NextLogits measured(NextLogits logits) {
    return [this, logits = std::move(logits), first = true](std::span<const int32_t> sequence) mutable {
      const auto start = Clock::now();
      const Tensor result = logits(sequence);
      const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
      (first ? prefill_seconds : decode_seconds) += seconds;
      decoded += first ? 0 : 1;
      first = false;
      return result;
    };
  }
};

/// Text for people, at once; control characters do not reach a terminal.
void stream_text(std::string_view text) {
  if (stdout_is_an_output()) return;
  const bool terminal = ::isatty(STDOUT_FILENO) != 0;
  const std::string shown = terminal ? printable(text) : std::string(text);
  std::fwrite(shown.data(), 1, shown.size(), stdout);
  flush_stdout();
}

std::string read_prompt(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  TORCH_CHECK(file, path, ": cannot be read");
  return text;
}

void check_arguments(const GenerateArguments& arguments) {
  TORCH_CHECK(!arguments.system || arguments.chat,
              "--system needs --chat: without it the prompt is continued as it is");
  TORCH_CHECK(arguments.prompt || !arguments.file.empty() || arguments.chat,
              "nothing to continue: give a PROMPT, --file or --chat");
  TORCH_CHECK(!arguments.prompt || !arguments.prompt->empty(), "the prompt is empty");
}

/// The options on the command line over what the checkpoint says.
void merge_sampling(GenerateArguments& arguments, const GenerationConfig& config) {
  SamplingOptions& sampling = arguments.generate.sampling;
  sampling = config.sampling;
  sampling.seed = arguments.common.seed;
  sampling.temperature = arguments.temperature.value_or(sampling.temperature);
  sampling.top_k = arguments.top_k.value_or(sampling.top_k);
  sampling.top_p = arguments.top_p.value_or(sampling.top_p);
  sampling.min_p = arguments.min_p.value_or(sampling.min_p);
  sampling.repetition_penalty = arguments.repetition_penalty.value_or(sampling.repetition_penalty);
  arguments.generate.eos = config.eos;
}

nlohmann::json to_json(const TokenLogprobs& logprobs, const Tokenizer& tokenizer) {
  const auto token = [&](int32_t id, double logprob) -> nlohmann::json {
    const std::string text = tokenizer.has_token(id) ? tokenizer.decode(std::vector{id}) : "";
    return {{"id", id}, {"text", text}, {"logprob", logprob}};
  };
  nlohmann::json json = token(logprobs.id, logprobs.logprob);
  json["top"] = nlohmann::json::array();
  for (const auto& [id, logprob] : logprobs.top) json["top"].push_back(token(id, logprob));
  return json;
}

/// A model, ready to answer.
class Generator {
 public:
  explicit Generator(GenerateArguments& arguments)
      : arguments_(arguments),
        model_(open_model(arguments.model), {.device = apply(arguments.common)}),
        tokenizer_(open_tokenizer(arguments.model)) {
    merge_sampling(arguments_, read_generation_config(model_.checkpoint()));
    if (!arguments_.chat) return;
    chat_.emplace(open_chat(arguments_.model));
    if (const auto id = tokenizer_.added_token(chat_->end_of_turn())) arguments_.generate.eos.push_back(*id);
  }

  /// Ids of a text that is continued, or of a conversation that is answered.
  std::vector<int32_t> encode(const std::string& prompt) {
    if (!chat_) return tokenizer_.encode(prompt);
    if (messages_.empty() && arguments_.system) messages_.push_back({"system", *arguments_.system});
    messages_.push_back({"user", prompt});
    return chat_->encode(tokenizer_, messages_);
  }

  /// Throws when it cannot work, before the model is read; then reads it. `prompt_tokens` 0: a conversation.
  void load(int64_t prompt_tokens) {
    arguments_.generate.context = context_of(prompt_tokens);
    const int64_t context = arguments_.generate.context;
    TORCH_CHECK(prompt_tokens < context, "the prompt has ", prompt_tokens, " tokens, but the context is ", context,
                " tokens: a longer `context` or a shorter prompt is needed");
    check_resident_memory(arguments_.model, model_, arguments_.load, context);
    warn_of_unused(model_);
    decoder_.emplace(load_resident(model_, arguments_.load));
    session_.emplace(*decoder_, Session::Options{.context = context, .cancelled = stop_requested});
  }

  /// Streams the answer; what --json gets of it.
  nlohmann::json answer(std::span<const int32_t> prompt) {
    Timing timing;
    catch_stop_signals();
    const Answer answer = baseq::generate(timing.measured(session_->logits()), tokenizer_, prompt, arguments_.generate,
                                          [](const Piece& piece) {
                                            stream_text(piece.text);
                                            return !stop_requested();
                                          });
    stream_text("\n");
    messages_.push_back({"assistant", answer.text});
    nlohmann::json json = describe(answer, prompt, timing);
    if (!arguments_.common.quiet && !arguments_.is_conversation()) print_summary(json);
    return json;
  }

 private:
  int64_t context_of(int64_t prompt_tokens) const {
    const int64_t trained = model_.config().max_position_embeddings;
    if (arguments_.context > 0) {
      if (trained > 0 && arguments_.context > trained) {
        spdlog::warn("{}: a context of {} tokens, but the model was made for {}", arguments_.model, arguments_.context,
                     trained);
      }
      return arguments_.context;
    }
    const int64_t wanted = prompt_tokens == 0 ? kConversationTokens : prompt_tokens + arguments_.generate.max_tokens;
    return trained > 0 ? std::min(trained, wanted) : wanted;
  }

  nlohmann::json describe(const Answer& answer, std::span<const int32_t> prompt, const Timing& timing) const {
    nlohmann::json json{{"text", answer.text},
                        {"finish_reason", baseq::name(answer.finish)},
                        {"prompt_ids", std::vector<int32_t>(prompt.begin(), prompt.end())},
                        {"ids", answer.ids},
                        {"prefill_seconds", timing.prefill_seconds},
                        {"decode_seconds", timing.decode_seconds},
                        {"decode_tokens_per_second", nullptr},
                        {"cache_bytes", session_->cache_bytes()}};
    if (timing.decoded > 0) {
      json["decode_tokens_per_second"] = static_cast<double>(timing.decoded) / timing.decode_seconds;
    }
    if (arguments_.generate.logprobs < 0) return json;
    json["logprobs"] = nlohmann::json::array();
    for (const TokenLogprobs& logprobs : answer.logprobs) json["logprobs"].push_back(to_json(logprobs, tokenizer_));
    return json;
  }

  void print_summary(const nlohmann::json& json) const {
    const size_t prompt = json["prompt_ids"].size();
    spdlog::info("{} tokens read in {}, {} written{}; ended by {}", prompt,
                 format_seconds(json["prefill_seconds"].get<double>()), json["ids"].size(),
                 json["decode_tokens_per_second"].is_null()
                     ? ""
                     : fmt::format(", {:.1f} a second", json["decode_tokens_per_second"].get<double>()),
                 json["finish_reason"].get<std::string>());
  }

  GenerateArguments& arguments_;
  Model model_;
  Tokenizer tokenizer_;
  std::optional<ChatTemplate> chat_;
  std::vector<Message> messages_;
  std::optional<Decoder> decoder_;
  std::optional<Session> session_;
};

/// A turn a line until the end of stdin. Ctrl-C ends an answer, or, while a line is awaited, the program.
nlohmann::json converse(Generator& generator) {
  const bool terminal = ::isatty(STDIN_FILENO) != 0 && ::isatty(STDOUT_FILENO) != 0;
  nlohmann::json turns = nlohmann::json::array();
  generator.load(/*prompt_tokens=*/0);
  for (std::string line;;) {
    release_stop_signals();
    if (terminal) stream_text("> ");
    if (!std::getline(std::cin, line)) break;
    if (line.find_first_not_of(" \t\r") == line.npos) continue;
    turns.push_back(generator.answer(generator.encode(line)));
    if (stop_requested() && !only_interrupted()) throw Interrupted("interrupted");
  }
  if (terminal) stream_text("\n");
  return turns;
}

/// A conversation where there may be one, else how fast the model is.
std::string next_after(const GenerateArguments& arguments) {
  const std::string model = shell_word(arguments.model);
  return arguments.chat ? fmt::format("baseq generate {} --chat, a conversation", model)
                        : fmt::format("baseq bench {}, its tokens a second", model);
}

void run(GenerateArguments& arguments) {
  check_arguments(arguments);
  check_outputs(arguments.common);
  if (!arguments.file.empty()) arguments.prompt = read_prompt(arguments.file);
  check_arguments(arguments);
  Generator generator(arguments);
  nlohmann::json json;
  if (arguments.is_conversation()) {
    json["turns"] = converse(generator);
  } else {
    const std::vector<int32_t> prompt = generator.encode(*arguments.prompt);
    TORCH_CHECK(!prompt.empty(), "the prompt has no tokens");
    generator.load(static_cast<int64_t>(prompt.size()));
    json = generator.answer(prompt);
    if (stop_requested()) throw Interrupted("interrupted: the answer ends here");
  }
  const SamplingOptions& sampling = arguments.generate.sampling;
  json["model"] = arguments.model;
  json["sampling"] = {{"temperature", sampling.temperature},
                      {"top_k", sampling.top_k},
                      {"top_p", sampling.top_p},
                      {"min_p", sampling.min_p},
                      {"repetition_penalty", sampling.repetition_penalty},
                      {"seed", sampling.seed}};
  json["context"] = arguments.generate.context;
  json["peak_memory_bytes"] = peak_memory_bytes();
  write_json(arguments.common, json);
  if (!arguments.is_conversation()) {
    say_next(arguments.common.quiet, "{}", next_after(arguments));
  }
}

void add_text_options(CLI::App& command, GenerateArguments& arguments) {
  begin_group(command, "Text");
  auto* prompt = command.get_option("prompt");
  command.add_option("--file", arguments.file, "Read the prompt from this file; - is stdin")
      ->transform(input_file())
      ->excludes(prompt);
  auto* chat = command.add_flag("--chat", arguments.chat,
                                "Write the prompt as the model's chat template does; without one, a line is a turn");
  command.add_option("--system", arguments.system, "System message of the conversation")
      ->type_name("MESSAGE")
      ->needs(chat);
  command.add_option("--max-tokens", arguments.generate.max_tokens, "Tokens of an answer at most")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 24));
  command
      .add_option("--context", arguments.context,
                  "Tokens of prompt and answer at most (default: what the model was made for; 8192 in a conversation)")
      ->check(CLI::Range(2, 1 << 24));
  command
      .add_option("--stop", arguments.generate.stop, "A text that ends an answer and is no part of it; may be repeated")
      ->type_name("STRING")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
}

void add_sampling_options(CLI::App& command, GenerateArguments& arguments) {
  begin_group(command, "Sampling (defaults: the checkpoint's generation_config.json)");
  command.add_option("--temperature", arguments.temperature, "0: always the most probable token")
      ->check(CLI::Range(0.0, 1e6));
  command.add_option("--top-k", arguments.top_k, "Only the N most probable tokens; 0: all")
      ->check(CLI::Range(0, 1 << 30));
  command.add_option("--top-p", arguments.top_p, "Only the most probable tokens with this probability together")
      ->check(CLI::Range(0.0, 1.0));
  command.add_option("--min-p", arguments.min_p, "Only tokens with this share of the largest probability")
      ->check(CLI::Range(0.0, 1.0));
  command.add_option("--repetition-penalty", arguments.repetition_penalty, "Of tokens that are there; 1: none")
      ->check(CLI::Range(1e-3, 1e3));
}

}  // namespace

void add_generate(CLI::App& app) {
  auto arguments = std::make_shared<GenerateArguments>();
  CLI::App* command = app.add_subcommand("generate", "Continue a text, or hold a conversation");
  command
      ->add_option("model", arguments->model,
                   "Checkpoint directory, GGUF file, or org/name in the local Hugging Face cache")
      ->required()
      ->transform(checkpoint_path());
  command->add_option("prompt", arguments->prompt, "The text to continue or to answer");
  add_text_options(*command, *arguments);
  add_sampling_options(*command, *arguments);
  add_arithmetic_options(*command, arguments->load);
  add_common_options(*command, arguments->common, {.device = true, .threads = true, .seed = true, .quiet = true});
  command
      ->add_option("--logprobs", arguments->generate.logprobs,
                   "Log probabilities of each token and of the N most probable ones, in --json")
      ->check(CLI::Range(0, 1000))
      ->needs(command->get_option("--json"));
  command->footer(
      "Examples:\n"
      "  baseq generate out \"Once upon a time\" --temperature 0.8\n"
      "  baseq generate out --chat \"What is a prime number?\" --json answer.json\n"
      "  baseq generate out --chat --system \"Answer in one sentence.\"");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli

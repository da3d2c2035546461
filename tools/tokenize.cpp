#include <ATen/ATen.h>
#include <fmt/format.h>

#include <chrono>
#include <filesystem>
#include <memory>

#include "baseq/formats/open_model.h"
#include "baseq/io/checkpoint.h"
#include "baseq/tokenizer/token_windows.h"
#include "help.h"
#include "next_step.h"
#include "output_files.h"

namespace baseq::cli {
namespace {

struct TokenizeArguments {
  CommonOptions common;
  std::string model, text, output;
  int64_t seq_len = 0;
};

void run(const TokenizeArguments& arguments) {
  apply(arguments.common);
  const OutputFile output{"--output", arguments.output, kTokenIdsMark};
  check_outputs(arguments.common, {output});
  const auto start = std::chrono::steady_clock::now();
  Tensor ids = tokenize_file(arguments.text, open_tokenizer(arguments.model)).to(at::kInt);
  const int64_t num_tokens = ids.numel();
  if (arguments.seq_len > 0) ids = split_windows(ids, arguments.seq_len);
  check_output_file(output.option, output.path, output.mark);
  save_safetensors(arguments.output, {{"input_ids", ids}}, {{"baseq", "token ids"}, {"format", "pt"}});
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (ids.dim() == 2) {
    print_text("{}: {} windows of {} of {} tokens\n", arguments.output, ids.size(0), ids.size(1), num_tokens);
  } else {
    print_text("{}: {} tokens\n", arguments.output, num_tokens);
  }
  write_json(arguments.common, {{"model", arguments.model},
                                {"text", arguments.text},
                                {"output", arguments.output},
                                {"num_tokens", num_tokens},
                                {"shape", std::vector<int64_t>(ids.sizes().begin(), ids.sizes().end())},
                                {"seconds", seconds}});
  say_next(false, "baseq eval {} --tokens {}", shell_word(arguments.model), shell_word(arguments.output));
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto arguments = std::make_shared<TokenizeArguments>();
  CLI::App* command =
      app.add_subcommand("tokenize", "Token ids of a text, for eval --tokens and quantize --calibration");
  command->add_option("model", arguments->model, "Checkpoint directory, GGUF file, org/name, or a tokenizer.json")
      ->required()
      ->transform(CLI::ExistingFile | checkpoint_directory());
  begin_group(*command, "Text and output");
  command->add_option("--text", arguments->text, "Text or .jsonl file; - is stdin")
      ->required()
      ->transform(input_file());
  command->add_option("--output", arguments->output, ".safetensors file: int32 input_ids [num_tokens]")
      ->required()
      ->transform(output_file());
  command->add_option("--seq-len", arguments->seq_len, "Cut into windows, input_ids [n, N]; the rest is left out")
      ->check(CLI::Range(1, 1 << 24));
  add_common_options(*command, arguments->common, {.threads = true});
  command->footer("Example:\n  baseq tokenize MODEL --text text.txt --output ids.safetensors --seq-len 2048");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli

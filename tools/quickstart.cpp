#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <memory>

#include "baseq/formats/open_model.h"
#include "baseq/pipeline/job.h"
#include "baseq/runtime/chat_template.h"
#include "child_process.h"
#include "defaults.h"
#include "help.h"
#include "io/hub_cache.h"
#include "next_step.h"
#include "output_files.h"
#include "stop_signals.h"

namespace baseq::cli {
namespace {

namespace fs = std::filesystem;

struct QuickstartArguments {
  std::string named;  ///< as the user wrote the model
  std::string recipe = kDefaultRecipe;
};

/// Models of the local cache of the Hub, "org/name", a few of them.
std::vector<std::string> cached_models() {
  constexpr size_t kMost = 5;
  std::vector<std::string> found;
  std::error_code error;
  for (fs::directory_iterator entry(hub_cache(), error), end; !error && entry != end; entry.increment(error)) {
    if (!entry->path().filename().string().starts_with("models--")) continue;
    const std::string name = model_name(entry->path() / "snapshots" / "main");
    try {
      if (fs::exists(resolve_checkpoint(name) / "config.json")) found.push_back(name);
    } catch (const c10::Error&) {
      // Not downloaded as a whole.
    }
  }
  std::sort(found.begin(), found.end());
  if (found.size() > kMost) found.resize(kMost);
  return found;
}

void say_how_to_get_a_model() {
  constexpr const char* kSmallModel = "HuggingFaceTB/SmolLM2-135M-Instruct";
  print_text(
      "baseq quickstart MODEL quantizes a model, measures what that costs, and lets the result write a text.\n"
      "MODEL is a directory with a Hugging Face checkpoint, or the name of a model that was downloaded:\n\n"
      "  pip install huggingface_hub && hf download {0}\n"
      "  baseq quickstart {0}\n",
      kSmallModel);
  const std::vector<std::string> cached = cached_models();
  if (!cached.empty()) print_text("\nAlready downloaded: {}\n", fmt::join(cached, ", "));
}

bool has_chat_template(const std::string& model) {
  try {
    (void)ChatTemplate(open_chat(model));
    return true;
  } catch (const c10::Error&) {
    return false;
  }
}

/// Shows a command as a user would write it, and runs it.
void step(const std::vector<std::string>& words) {
  std::string command = "baseq";
  for (const std::string& word : words) command += " " + shell_word(word);
  print_text("$ {}\n", command);
  std::fflush(stdout);
  const ChildStatus status = run_self(words, {});
  if (stop_requested()) throw Interrupted("stopped; the same command goes on");
  TORCH_CHECK(status.success(), "quickstart: this command failed: ", command);
  print_text("\n");
}

void run(const QuickstartArguments& arguments) {
  if (arguments.named.empty()) return say_how_to_get_a_model();
  const std::string model = resolve_checkpoint(arguments.named).string(), &named = arguments.named;
  const std::string output = default_output(model, arguments.recipe);
  const std::string text = installed_file(kEvaluationText).string();
  forward_signals_to_children();
  if (fs::exists(output)) {
    print_text("{} exists and is used as it is\n\n", output);
  } else {
    std::vector<std::string> quantize{"quantize", named};
    if (arguments.recipe != kDefaultRecipe) quantize.insert(quantize.end(), {"--recipe", arguments.recipe});
    step(quantize);
  }
  step({"compare", named, output, "--text", text, "--max-windows", "4", "--reference", named});
  if (has_chat_template(model)) {
    step({"generate", output, "--chat", "What is a prime number?", "--max-tokens", "60"});
  } else {
    step({"generate", output, "Once upon a time", "--max-tokens", "60"});
  }
}

}  // namespace

void add_quickstart(CLI::App& app) {
  auto arguments = std::make_shared<QuickstartArguments>();
  CLI::App* command = app.add_subcommand("quickstart", "Quantize a model, measure it and let it write: the whole tour");
  command->add_option("model", arguments->named, "Checkpoint directory, or org/name in the local Hugging Face cache")
      ->check(checkpoint_directory());
  begin_group(*command, "Method");
  command->add_option("--recipe", arguments->recipe, "Name of a built-in recipe (baseq recipes lists them), or a file")
      ->capture_default_str()
      ->check(recipe_name());
  command->footer("Examples:\n  baseq quickstart\n  baseq quickstart HuggingFaceTB/SmolLM2-135M-Instruct");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli

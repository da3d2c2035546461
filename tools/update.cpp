#include <spdlog/spdlog.h>

#include <memory>

#include "baseq/version.h"
#include "formats/native/modeling_source.h"
#include "formats/update_modeling.h"
#include "help.h"
#include "next_step.h"
#include "output_files.h"

namespace baseq::cli {
namespace {

void run(const std::string& model) {
  const ModelingUpdate update = update_modeling_file(model);
  print_text("{}/{}: {}\n", model, kModelingFile,
             update.written ? "replaced by that of baseq " + version() + "; no other file changed" : "up to date");
  if (!update.named) {
    spdlog::warn(
        "{}/config.json does not name the file, so transformers will not use it; add \"auto_map\": "
        "{{\"AutoModelForCausalLM\": \"{}\"}}",
        model, kModelingClass);
  }
  say_next(false, "AutoModelForCausalLM.from_pretrained(\"{}\", trust_remote_code=True) in Python", model);
}

}  // namespace

void add_update(CLI::App& app) {
  auto model = std::make_shared<std::string>();
  CLI::App* command =
      app.add_subcommand("update", "Replaces the modeling_baseq.py of a quantized checkpoint by this program's");
  command->add_option("model", *model, "Directory of a checkpoint that baseq quantized")
      ->required()
      ->transform(checkpoint_directory());
  command->footer("Example:\n  baseq update out");
  command->callback([model] { run(*model); });
}

}  // namespace baseq::cli

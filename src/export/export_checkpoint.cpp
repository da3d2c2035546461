#include "baseq/export/export_checkpoint.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <set>

#include "formats/export_source.h"
#include "formats/model_card.h"
#include "formats/native/modeling_source.h"
#include "io/apart.h"
#include "io/files.h"
#include "io/hub_cache.h"
#include "io/output_file.h"
#include "io/side_files.h"
#include "io/units.h"
#include "model/unused_tensors.h"
#include "pipeline/run_description.h"
#include "pipeline/run_log.h"

namespace baseq {
namespace {

/// In the order of ExportFormat.
const std::vector<std::string> kFormats = {"hf", "compressed-tensors", "gptq", "awq", "peft", "gguf"};

/// What a native checkpoint has and no export keeps.
const std::set<std::string> kOwnFiles = {kModelingFile, kRunLogFile};

ExportPlan plan_format(std::shared_ptr<const ExportSource> source, at::ScalarType dtype, const ExportOptions& options) {
  switch (options.format) {
    case ExportFormat::kHuggingFace:
      return plan_hugging_face(std::move(source), dtype);
    case ExportFormat::kCompressedTensors:
      return plan_compressed_tensors(std::move(source), dtype);
    case ExportFormat::kGptq:
      return plan_gptq(std::move(source), dtype);
    case ExportFormat::kAwq:
      return plan_awq(std::move(source), dtype);
    case ExportFormat::kPeft:
      return plan_peft(std::move(source), dtype);
    case ExportFormat::kGguf:
      return plan_gguf(std::move(source), options.gguf_type, options.gguf_head_type);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown ExportFormat");
}

/// Throws what of the source an export would lose; returns what is lost without harm.
std::vector<std::string> check_source(const ExportSource& source) {
  std::vector<std::string> warnings;
  for (const Unused& unused : find_unused(source.model())) {
    TORCH_CHECK(unused.harmless, source.path(), ": ", unused.message());
    warnings.push_back(unused.message());
  }
  return warnings;
}

/// The side files that an export copies: none into a file, and none of those next to one, which need not belong to it.
SideFiles side_files(const Checkpoint& checkpoint, const ExportPlan& plan) {
  if (plan.single_file || checkpoint.directory() != checkpoint.path()) return {};
  nlohmann::json config = checkpoint.config();
  const nlohmann::json own{{"AutoModelForCausalLM", kModelingClass}};
  if (config.value("auto_map", nlohmann::json()) == own) config.erase("auto_map");
  return find_side_files(checkpoint.path(), config, kOwnFiles);
}

/// How a directory of the plan's format is loaded.
std::string how_to_run(const std::string& method, bool adapter) {
  std::string text = "## Run it\n\nMODEL is this directory, or its name on the Hub.\n\n";
  if (!method.empty()) text += "```bash\nvllm serve MODEL\n```\n\n";
  text +=
      "```python\nfrom transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained(MODEL, "
      "dtype=\"auto\")\n";
  if (adapter) text += "from peft import PeftModel\nmodel = PeftModel.from_pretrained(model, f\"{MODEL}/adapter\")\n";
  return text + "```\n";
}

/// The card of the directory, and what the format has to say below it; empty where the source's own is too long to
/// join.
std::string readme_of_export(const Checkpoint& checkpoint, const ExportPlan& plan) {
  const SideFiles files = side_files(checkpoint, plan);
  if (has_long_readme(files)) return plan.readme.empty() ? "" : readme_of(files) + "\n" + plan.readme;
  const auto quantization = plan.config.find("quantization_config");
  const std::string method =
      quantization == plan.config.end() ? "" : quantization->value("quant_method", std::string());
  const bool adapter =
      std::ranges::any_of(plan.tensors, [](const PlannedTensor& tensor) { return !tensor.file.empty(); });
  ModelCard card{.source = model_name(checkpoint.path()), .base_model = name_on_hub(checkpoint)};
  card.title = method.empty() ? "dequantized" : "as " + method;
  if (!method.empty()) card.tags.push_back(method);
  card.facts.emplace_back("format", method.empty() ? "dequantized weights" : method);
  card.facts.emplace_back("size", format_bytes(plan.num_bytes()));
  card.sections = how_to_run(method, adapter) + (plan.readme.empty() ? "" : "\n" + plan.readme);
  return card_text(card, readme_of(files));
}

/// Bytes on the disk: of tensors, their entries in headers and index, configuration and side files.
int64_t written_bytes(const Checkpoint& checkpoint, const ExportPlan& plan) {
  constexpr int64_t kEntry = 128, kConfiguration = 32 << 10;
  int64_t bytes = plan.num_bytes() + side_files(checkpoint, plan).num_bytes();
  bytes += plan.single_file ? plan.single_file->num_header_bytes
                            : kEntry * static_cast<int64_t>(plan.tensors.size()) + kConfiguration;
  for (const auto& [name, content] : plan.files) bytes += static_cast<int64_t>(content.size());
  return bytes;
}

CheckpointWriter::Options writer_options(const Checkpoint& checkpoint, CheckpointWriter::Options options) {
  options.source = checkpoint.path();
  options.own_files = own_files();
  return options;
}

}  // namespace

ExportFormat export_format(const std::string& name) {
  const auto it = std::find(kFormats.begin(), kFormats.end(), name);
  TORCH_CHECK(it != kFormats.end(), "export: format \"", name, "\" is not known; known are ",
              fmt::format("{}", fmt::join(kFormats, ", ")));
  return static_cast<ExportFormat>(it - kFormats.begin());
}

ExportPlan plan_export(const StoredModel& model, const ExportOptions& options) {
  const Checkpoint& checkpoint = model.tensors;
  const bool half = options.format == ExportFormat::kGptq || options.format == ExportFormat::kAwq;
  const at::ScalarType dtype = options.dtype.value_or(half ? at::kHalf : at::kBFloat16);
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, "export: dtype is ", dtype,
              ", expected float32, float16 or bfloat16");
  const c10::NoGradGuard no_grad;
  auto source = std::make_shared<const ExportSource>(model);
  const bool dequantized = options.format == ExportFormat::kHuggingFace ||
                           (options.format == ExportFormat::kGguf && options.gguf_type == "F16");
  for (const SourceLinear& linear : source->linears()) {
    TORCH_CHECK(dequantized || linear.has_codes, source->path(), ": ", linear.full_name,
                " has groups of scattered columns, or rows on different grids; formats hf and gguf F16 carry the "
                "dequantized weights");
  }
  std::vector<std::string> warnings = check_source(*source);
  ExportPlan plan = plan_format(std::move(source), dtype, options);
  const SideFiles files = side_files(checkpoint, plan);
  TORCH_CHECK(files.problems.empty(), files.problems.front());
  if (!files.left_out.empty()) warnings.push_back(files.warning());
  plan.warnings = std::move(warnings);
  if (options.format != ExportFormat::kGguf && checkpoint.directory() != checkpoint.path()) {
    plan.notes.push_back(
        "The result has no tokenizer: a GGUF file holds none of its files. Copy them from the original model.");
  }
  return plan;
}

void check_export_place(const Checkpoint& checkpoint, const ExportPlan& plan, const std::filesystem::path& output,
                        const CheckpointWriter::Options& options) {
  const int64_t num_bytes = written_bytes(checkpoint, plan);
  if (plan.single_file) {
    check_apart(output, checkpoint.path());
    return plan.single_file->check_output(output, options.force, num_bytes);
  }
  CheckpointWriter::check_place(output, writer_options(checkpoint, options));
  check_disk_space("export", output, num_bytes);
}

void write_export(const Checkpoint& checkpoint, const ExportPlan& plan, const std::filesystem::path& output,
                  const CheckpointWriter::Options& options,
                  const std::function<void(int64_t done, int64_t total)>& progress) {
  const c10::NoGradGuard no_grad;
  if (plan.single_file) {
    check_apart(output, checkpoint.path());
    return plan.single_file->write(plan, output, options.force, progress);
  }
  CheckpointWriter writer(output, writer_options(checkpoint, options));
  const auto total = static_cast<int64_t>(plan.tensors.size());
  std::vector<CheckpointWriter::Expected> expected;
  for (const PlannedTensor& planned : plan.tensors) {
    expected.push_back({planned.name, {planned.dtype, planned.shape}, planned.file});
  }
  writer.expect(expected);
  for (int64_t i = 0; i < total; ++i) {
    const PlannedTensor& planned = plan.tensors[static_cast<size_t>(i)];
    if (planned.file.empty()) {
      writer.add(planned.name, made(planned));
    } else {
      writer.add_beside(planned.file, planned.name, made(planned));
    }
    if (progress) progress(i + 1, total);
  }
  for (const auto& [name, content] : plan.files) writer.write_file(name, content);
  if (const std::string readme = readme_of_export(checkpoint, plan); !readme.empty()) {
    writer.write_file(kCardFile, readme);
  }
  // What lies beside a file of a model need not belong to it.
  if (checkpoint.directory() == checkpoint.path()) writer.copy_side_files(checkpoint.path(), kOwnFiles);
  writer.finish(plan.config, [&](const Checkpoint& written) {
    const auto planned = std::count_if(plan.tensors.begin(), plan.tensors.end(),
                                       [](const PlannedTensor& tensor) { return tensor.file.empty(); });
    TORCH_CHECK(static_cast<int64_t>(written.names().size()) == planned, "export: ", written.names().size(),
                " tensors were written but ", planned, " were planned");
    plan.check_weights(written, [&] {
      if (progress) progress(total, total);
    });
  });
}

}  // namespace baseq

#include "calibration_options.h"

#include <fmt/format.h>

#include <charconv>
#include <filesystem>
#include <map>

#include "commands.h"

namespace baseq::cli {
namespace {

/// A file, or a file and its weight after a colon. A file of that whole name comes first.
CalibrationData::File file_and_weight(const std::string& text) {
  std::error_code error;
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || std::filesystem::exists(text, error)) return {.path = text};
  const char *first = text.data() + colon + 1, *last = text.data() + text.size();
  double weight = 0;
  const auto [end, failed] = std::from_chars(first, last, weight);
  if (failed != std::errc() || end != last) return {.path = text};
  return {.path = text.substr(0, colon), .weight = weight};
}

CLI::Validator file_with_weight() {
  return CLI::Validator(
      [](std::string& text) {
        if (text == "-" || text.starts_with("-:")) text.replace(0, 1, "/dev/stdin");
        const CalibrationData::File file = file_and_weight(text);
        if (!(file.weight > 0 && file.weight < 1e9)) return text + ": a weight is a positive number";
        return CLI::ExistingFile(file.path.string());
      },
      "FILE[:WEIGHT]");
}

}  // namespace

void add_calibration_options(CLI::App& command, CalibrationArguments& arguments) {
  using Split = CalibrationData::Split;
  command
      .add_option("--calibration", arguments.files,
                  "Text, .jsonl with \"text\" or \"messages\", or .safetensors with input_ids; - is text from stdin. "
                  "Several are mixed by their weights (default 1). Default: a text that is installed with baseq")
      ->transform(file_with_weight())
      ->take_all()
      ->allow_extra_args(false);  // what follows may be the model
  const std::map<std::string, Split> names{
      {"random", Split::kRandom}, {"packed", Split::kPacked}, {"samples", Split::kSamples}};
  command
      .add_option("--calibration-split", arguments.split,
                  "random: anywhere in the text; packed: whole documents one after the other; samples: the start of "
                  "one document each")
      ->transform(CLI::CheckedTransformer(names).description("{random,packed,samples}"))
      ->default_str("random")
      ->needs(command.get_option("--calibration"));
}

CalibrationData calibration_data(const CalibrationArguments& arguments) {
  CalibrationData data{.split = arguments.split};
  for (const std::string& file : arguments.files) data.files.push_back(file_and_weight(file));
  return data;
}

std::string describe_read(const CalibrationRead& read) {
  const std::string documents =
      read.documents == 0 ? "" : fmt::format("{} of {} documents, ", read.tokenized, read.documents);
  const std::string skipped =
      read.skipped == 0 ? "" : fmt::format("; {} skipped, the first: {}", read.skipped, read.why);
  return fmt::format("calibration: {}: {}{} tokens, {} windows{}", read.file.string(), documents, read.tokens,
                     read.windows, skipped);
}

nlohmann::json json_of_reads(const std::vector<CalibrationRead>& reads) {
  nlohmann::json files = nlohmann::json::array();
  for (const CalibrationRead& read : reads) {
    files.push_back({{"file", read.file.string()},
                     {"documents", read.documents},
                     {"tokenized", read.tokenized},
                     {"tokens", read.tokens},
                     {"skipped", read.skipped},
                     {"windows", read.windows}});
  }
  return files;
}

}  // namespace baseq::cli

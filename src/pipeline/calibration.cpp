#include "baseq/pipeline/calibration.h"

#include <ATen/ATen.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "baseq/io/safetensors.h"

namespace baseq {
namespace {

std::string read_text(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  TORCH_CHECK(stream.good(), file.string(), ": cannot be opened");
  std::ostringstream text;
  text << stream.rdbuf();
  return std::move(text).str();
}

std::string read_jsonl(const std::filesystem::path& file) {
  std::istringstream lines(read_text(file));
  std::string line, text;
  for (int64_t number = 1; std::getline(lines, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    TORCH_CHECK(record.is_object() && record.contains("text") && record["text"].is_string(), file.string(), ": line ",
                number, ": expected an object with a string \"text\"");
    if (!text.empty()) text += "\n\n";
    text += record["text"].get<std::string>();
  }
  return text;
}

Tensor read_ids(const std::filesystem::path& file) {
  const SafetensorsFile tensors(file);
  const auto names = tensors.names();
  TORCH_CHECK(tensors.contains("input_ids") || names.size() == 1, file.string(), ": expected a tensor \"input_ids\"");
  const Tensor ids = tensors.tensor(tensors.contains("input_ids") ? "input_ids" : names[0]);
  TORCH_CHECK(at::isIntegralType(ids.scalar_type(), /*includeBool=*/false) && (ids.dim() == 2 || ids.dim() == 1),
              file.string(), ": expected integer windows [n, seq_len] or ids [num_tokens], got ", ids.scalar_type(),
              " ", ids.sizes());
  return ids;
}

Tensor first_windows(const std::filesystem::path& file, const Tensor& ids, const CalibrationOptions& options) {
  TORCH_CHECK(ids.size(0) >= options.num_samples && ids.size(1) >= options.seq_len, file.string(), ": holds ",
              ids.size(0), " windows of ", ids.size(1), " tokens but the recipe asks for ", options.num_samples, " of ",
              options.seq_len);
  return ids.narrow(0, 0, options.num_samples).narrow(1, 0, options.seq_len).to(at::kLong).contiguous();
}

}  // namespace

Tensor tokenize_file(const std::filesystem::path& file, const Tokenizer& tokenizer) {
  const auto ids = tokenizer.encode(file.extension() == ".jsonl" ? read_jsonl(file) : read_text(file));
  return at::tensor(at::ArrayRef<int32_t>(ids), at::kInt).to(at::kLong);
}

Tensor read_calibration(const std::filesystem::path& file, const std::filesystem::path& tokenizer_json,
                        const CalibrationOptions& options) {
  const bool has_ids = file.extension() == ".safetensors";
  const Tensor ids = has_ids ? read_ids(file).to(at::kLong) : tokenize_file(file, Tokenizer(tokenizer_json));
  if (ids.dim() == 2) return first_windows(file, ids, options);
  const int64_t num_starts = ids.size(0) - options.seq_len + 1;
  TORCH_CHECK(num_starts > 0, file.string(), ": holds ", ids.size(0), " tokens but a window needs ", options.seq_len);
  // The remainder of a 64-bit draw, not std::uniform_int_distribution, whose results differ between libraries.
  std::mt19937_64 random(options.seed);
  std::vector<Tensor> windows;
  for (int64_t i = 0; i < options.num_samples; ++i) {
    windows.push_back(
        ids.narrow(0, static_cast<int64_t>(random() % static_cast<uint64_t>(num_starts)), options.seq_len));
  }
  return at::stack(windows);
}

}  // namespace baseq

#include "baseq/pipeline/calibration.h"

#include <ATen/ATen.h>

#include <cctype>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>
#include <string_view>

#include "baseq/io/dtype_name.h"
#include "baseq/io/safetensors.h"

namespace baseq {
namespace {

/// Without the mark of UTF-8 that some editors put first.
std::string read_text(const std::filesystem::path& file) {
  constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
  std::ifstream stream(file, std::ios::binary);
  TORCH_CHECK(stream.good(), file.string(), ": cannot be opened");
  std::ostringstream content;
  content << stream.rdbuf();
  std::string text = std::move(content).str();
  if (text.starts_with(kByteOrderMark)) text.erase(0, kByteOrderMark.size());
  return text;
}

std::string read_jsonl(const std::filesystem::path& file) {
  std::istringstream lines(read_text(file));
  std::string line, text;
  for (int64_t number = 1; std::getline(lines, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const std::string where = file.string() + ": line " + std::to_string(number);
    TORCH_CHECK(!record.is_discarded(), where, ": is not valid JSON");
    TORCH_CHECK(!record.is_object() || record.contains("text") || !record.contains("messages"), where,
                ": holds \"messages\" of a chat; expected \"text\", as the model's chat template makes it of them");
    TORCH_CHECK(record.is_object() && record.contains("text") && record["text"].is_string(), where,
                ": expected an object with a string \"text\"");
    if (!text.empty()) text += "\n\n";
    text += record["text"].get<std::string>();
  }
  return text;
}

/// In small letters.
std::string extension_of(const std::filesystem::path& file) {
  std::string extension = file.extension().string();
  for (char& c : extension) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return extension;
}

Tensor first_windows(const std::filesystem::path& file, const Tensor& ids, const CalibrationOptions& options) {
  TORCH_CHECK(ids.size(0) >= options.num_samples && ids.size(1) >= options.seq_len, file.string(), ": holds ",
              ids.size(0), " windows of ", ids.size(1), " tokens but the recipe asks for ", options.num_samples, " of ",
              options.seq_len);
  return ids.narrow(0, 0, options.num_samples).narrow(1, 0, options.seq_len).contiguous();
}

}  // namespace

Tensor tokenize_file(const std::filesystem::path& file, const Tokenizer& tokenizer) {
  const std::string extension = extension_of(file);
  TORCH_CHECK(extension != ".json", file.string(),
              ": is JSON; expected plain text, or a .jsonl file with one object with \"text\" per line");
  const std::string text = extension == ".jsonl" ? read_jsonl(file) : read_text(file);
  try {
    const auto ids = tokenizer.encode(text);
    return at::tensor(at::ArrayRef<int32_t>(ids), at::kInt).to(at::kLong);
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, file.string(), ": ", error.what_without_backtrace());
  }
}

Tensor read_token_ids(const std::filesystem::path& file) {
  const SafetensorsFile tensors(file);
  const auto names = tensors.names();
  TORCH_CHECK(tensors.contains("input_ids") || names.size() == 1, file.string(),
              ": expected a tensor \"input_ids\", or a single tensor");
  const Tensor ids = tensors.tensor(tensors.contains("input_ids") ? "input_ids" : names[0]);
  TORCH_CHECK(at::isIntegralType(ids.scalar_type(), /*includeBool=*/false) && (ids.dim() == 2 || ids.dim() == 1),
              file.string(), ": expected integers, ids [num_tokens] or integer windows [n, seq_len], got ",
              dtype_name(ids.scalar_type()), " ", ids.sizes());
  return ids.to(at::kLong);
}

void check_token_ids(const Tensor& ids, int64_t vocab_size, const std::string& who) {
  if (ids.numel() == 0) return;
  const auto low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>();
  TORCH_CHECK(low >= 0 && high < vocab_size, who, ": token ids run from ", low, " to ", high,
              " but the model knows 0 to ", vocab_size - 1);
}

Tensor read_calibration(const std::filesystem::path& file, const std::filesystem::path& tokenizer_json,
                        const CalibrationOptions& options) {
  const bool has_ids = extension_of(file) == ".safetensors";
  const Tensor ids = has_ids ? read_token_ids(file) : tokenize_file(file, Tokenizer(tokenizer_json));
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

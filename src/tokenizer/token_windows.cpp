#include "baseq/tokenizer/token_windows.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string_view>
#include <system_error>

#include "baseq/io/checkpoint.h"
#include "io/dtype_name.h"

namespace baseq {
namespace {

std::ifstream open_text(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  TORCH_CHECK(stream.good(), file.string(), ": cannot be opened");
  return stream;
}

/// The mark of UTF-8 that some editors put first.
void remove_byte_order_mark(std::string& text) {
  constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";
  if (text.starts_with(kByteOrderMark)) text.erase(0, kByteOrderMark.size());
}

std::string read_text(const std::filesystem::path& file) {
  std::ifstream stream = open_text(file);
  std::string text;
  std::error_code error;  // a pipe has no size
  if (const auto size = std::filesystem::file_size(file, error); !error) text.reserve(size);
  std::array<char, 1 << 16> piece;
  while (stream.read(piece.data(), piece.size()) || stream.gcount() > 0) {
    text.append(piece.data(), static_cast<size_t>(stream.gcount()));
  }
  remove_byte_order_mark(text);
  return text;
}

std::string read_jsonl(const std::filesystem::path& file) {
  std::ifstream lines = open_text(file);
  std::string line, text;
  for (int64_t number = 1; std::getline(lines, line); ++number) {
    if (number == 1) remove_byte_order_mark(line);
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
  return ids.narrow(0, 0, options.num_samples).narrow(1, 0, options.seq_len).to(at::kLong).contiguous();
}

/// int32 [num_tokens]. The ids of a long text take about as much memory as the text, which is gone by then.
Tensor text_ids(const std::filesystem::path& file, const Tokenizer& tokenizer) {
  const std::string extension = extension_of(file);
  TORCH_CHECK(extension != ".json", file.string(),
              ": is JSON; expected plain text, or a .jsonl file with one object with \"text\" per line");
  const auto encode = [&](const std::string& text) {
    try {
      return std::make_shared<std::vector<int32_t>>(tokenizer.encode(text));
    } catch (const c10::Error& error) {
      TORCH_CHECK(false, file.string(), ": ", error.what_without_backtrace());
    }
  };
  const auto ids = encode(extension == ".jsonl" ? read_jsonl(file) : read_text(file));
  const auto size = static_cast<int64_t>(ids->size());
  return at::from_blob(
      ids->data(), {size}, [ids](void*) {}, at::TensorOptions().dtype(at::kInt));
}

/// Integers [num_tokens] or [n, seq_len] in the type in which they are stored.
Tensor stored_ids(const std::filesystem::path& file) {
  const SafetensorsFile tensors(file);
  const auto names = tensors.names();
  TORCH_CHECK(tensors.contains("input_ids") || names.size() == 1, file.string(),
              ": expected a tensor \"input_ids\", or a single tensor");
  const Tensor ids = tensors.tensor(tensors.contains("input_ids") ? "input_ids" : names[0]);
  TORCH_CHECK(at::isIntegralType(ids.scalar_type(), /*includeBool=*/false) && (ids.dim() == 2 || ids.dim() == 1),
              file.string(), ": expected integers, ids [num_tokens] or integer windows [n, seq_len], got ",
              dtype_name(ids.scalar_type()), " ", ids.sizes());
  return ids;
}

}  // namespace

Tensor token_ids(const Tokenizer& tokenizer, std::string_view text) {
  const std::vector<int32_t> ids = tokenizer.encode(text);
  return at::tensor(ids, at::kLong).unsqueeze(0);
}

Tensor tokenize_file(const std::filesystem::path& file, const Tokenizer& tokenizer) {
  return text_ids(file, tokenizer).to(at::kLong);
}

Tensor read_token_ids(const std::filesystem::path& file) { return stored_ids(file).to(at::kLong); }

void check_token_ids(const Tensor& ids, int64_t vocab_size, const std::string& who) {
  if (ids.numel() == 0) return;
  const auto low = ids.min().item<int64_t>(), high = ids.max().item<int64_t>();
  TORCH_CHECK(low >= 0 && high < vocab_size, who, ": token ids run from ", low, " to ", high,
              " but the model knows 0 to ", vocab_size - 1);
}

Tensor split_windows(const Tensor& ids, int64_t seq_len, int64_t max_windows) {
  TORCH_CHECK(seq_len >= 1, "split_windows: seq_len is ", seq_len, " but a window needs at least 1 token");
  int64_t n = ids.numel() / seq_len;
  TORCH_CHECK(n > 0, "split_windows: the text has ", ids.numel(), " tokens but a window needs ", seq_len);
  if (max_windows > 0) n = std::min(n, max_windows);
  return ids.reshape({-1}).narrow(0, 0, n * seq_len).view({n, seq_len});
}

Tensor draw_windows(const Tensor& ids, int64_t num_windows, int64_t seq_len, uint64_t seed, const std::string& who) {
  const int64_t num_starts = ids.size(0) - seq_len + 1;
  TORCH_CHECK(num_starts > 0, who, ": holds ", ids.size(0), " tokens but a window needs ", seq_len);
  // The remainder of a 64-bit draw, not std::uniform_int_distribution, whose results differ between libraries.
  std::mt19937_64 random(seed);
  std::vector<Tensor> windows;
  for (int64_t i = 0; i < num_windows; ++i) {
    windows.push_back(ids.narrow(0, static_cast<int64_t>(random() % static_cast<uint64_t>(num_starts)), seq_len));
  }
  return at::stack(windows);
}

Tensor read_calibration(const std::filesystem::path& file, const std::filesystem::path& tokenizer_json,
                        const CalibrationOptions& options) {
  const bool has_ids = extension_of(file) == ".safetensors";
  const Tensor ids = has_ids ? stored_ids(file) : text_ids(file, Tokenizer(tokenizer_json));
  if (ids.dim() == 2) return first_windows(file, ids, options);
  return draw_windows(ids, options.num_samples, options.seq_len, options.seed, file.string()).to(at::kLong);
}

}  // namespace baseq

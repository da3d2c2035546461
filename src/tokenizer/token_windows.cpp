#include "baseq/tokenizer/token_windows.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <random>

#include "tokenizer/text_files.h"

namespace baseq {
namespace {

/// The "text" of all lines.
std::string read_texts(const std::filesystem::path& file) {
  std::string text;
  for_each_record(file, [&](const nlohmann::json& record, const std::string& where) {
    TORCH_CHECK(!record.is_object() || record.contains("text") || !record.contains("messages"), where,
                ": holds \"messages\" of a chat; expected \"text\", as the model's chat template makes it of them");
    TORCH_CHECK(record.is_object() && record.contains("text") && record["text"].is_string(), where,
                ": expected an object with a string \"text\"");
    if (!text.empty()) text += "\n\n";
    text += record["text"].get_ref<const std::string&>();
  });
  return text;
}

}  // namespace

Tensor token_ids(const Tokenizer& tokenizer, std::string_view text) {
  const std::vector<int32_t> ids = tokenizer.encode(text);
  return at::tensor(ids, at::kLong).unsqueeze(0);
}

Tensor tokenize_file(const std::filesystem::path& file, const Tokenizer& tokenizer) {
  check_text_file(file);
  const auto read = extension_of(file) == ".jsonl" ? read_texts : read_text;
  const Tensor ids = encode_file_text(file, read(file), tokenizer);
  return ids.to(at::kLong);  // the text is gone by then
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

}  // namespace baseq

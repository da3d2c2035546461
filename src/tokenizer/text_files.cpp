#include "tokenizer/text_files.h"

#include <ATen/ATen.h>

#include <array>
#include <cctype>
#include <fstream>
#include <memory>
#include <string_view>
#include <system_error>
#include <vector>

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

}  // namespace

std::string extension_of(const std::filesystem::path& file) {
  std::string extension = file.extension().string();
  for (char& c : extension) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return extension;
}

void check_text_file(const std::filesystem::path& file) {
  const std::string extension = extension_of(file);
  TORCH_CHECK(extension != ".json", file.string(),
              ": is JSON; expected plain text, or a .jsonl file with one object with \"text\" per line");
  TORCH_CHECK(extension != ".parquet", file.string(),
              ": is Parquet; convert it to .jsonl: python -c \"import pandas; pandas.read_parquet('", file.string(),
              "').to_json('", std::filesystem::path(file).replace_extension(".jsonl").string(),
              "', orient='records', lines=True)\"");
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

void for_each_record(const std::filesystem::path& file,
                     const std::function<void(nlohmann::json& record, const std::string& where)>& fn) {
  std::ifstream lines = open_text(file);
  std::string line;
  for (int64_t number = 1; std::getline(lines, line); ++number) {
    if (number == 1) remove_byte_order_mark(line);
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    auto record = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    const std::string where = file.string() + ": line " + std::to_string(number);
    TORCH_CHECK(!record.is_discarded(), where, ": is not valid JSON");
    fn(record, where);
  }
}

Tensor encode_file_text(const std::filesystem::path& file, const std::string& text, const Tokenizer& tokenizer) {
  std::shared_ptr<std::vector<int32_t>> ids;
  try {
    ids = std::make_shared<std::vector<int32_t>>(tokenizer.encode(text));
  } catch (const c10::Error& error) {
    TORCH_CHECK(false, file.string(), ": ", error.what_without_backtrace());
  }
  const auto size = static_cast<int64_t>(ids->size());
  return at::from_blob(
      ids->data(), {size}, [ids](void*) {}, at::TensorOptions().dtype(at::kInt));
}

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

}  // namespace baseq

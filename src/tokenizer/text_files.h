#pragma once

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "baseq/tensor.h"
#include "baseq/tokenizer/tokenizer.h"

/// Files of text, lines of JSON and token ids. Not installed.
namespace baseq {

/// In small letters, such as ".jsonl".
std::string extension_of(const std::filesystem::path& file);

/// Throws c10::Error for a file in a format that is not read as text: JSON, and Parquet, which a line of Python
/// converts.
void check_text_file(const std::filesystem::path& file);

/// The whole file without a byte order mark. Throws c10::Error naming it when it cannot be opened.
std::string read_text(const std::filesystem::path& file);

/// fn(record, where) for every line of a .jsonl file that is not empty; `where` names file and line. Throws c10::Error
/// for a line that is not JSON.
void for_each_record(const std::filesystem::path& file,
                     const std::function<void(nlohmann::json& record, const std::string& where)>& fn);

/// int32 [num_tokens]. What the tokenizer throws begins with the name of the file.
Tensor encode_file_text(const std::filesystem::path& file, const std::string& text, const Tokenizer& tokenizer);

/// The tensor `input_ids` of a .safetensors file or its only one, in the type in which it is stored: integers
/// [num_tokens] or [n, seq_len].
Tensor stored_ids(const std::filesystem::path& file);

}  // namespace baseq

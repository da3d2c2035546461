#pragma once

#include <filesystem>
#include <string>

#include "baseq/tensor.h"
#include "baseq/tokenizer/tokenizer.h"

namespace baseq {

struct CalibrationOptions {
  int64_t num_samples = 128;  ///< windows
  int64_t seq_len = 2048;     ///< tokens a window
  uint64_t seed = 0;
};

/// Token windows for calibration, int64 [num_samples, seq_len]:
/// - `.safetensors`: the tensor `input_ids` (or the only one) holds integer windows [n, seq_len]; the first
/// num_samples; or they are the ids of a text [num_tokens], as `baseq tokenize` writes them;
/// - `.jsonl`: the "text" of each line, joined by two newlines, then as text;
/// - anything else: UTF-8 text, tokenized once.
/// From text come windows at random positions chosen by the seed.
/// @param tokenizer_json needed for text; throws c10::Error when it is missing, or when the file is too short.
Tensor read_calibration(const std::filesystem::path& file, const std::filesystem::path& tokenizer_json,
                        const CalibrationOptions& options);

/// Text of a file, `.jsonl` or plain, tokenized: int64 [num_tokens]. A byte order mark is left out. Throws c10::Error
/// naming the file, also for `.json`, whose braces are hardly meant as text.
Tensor tokenize_file(const std::filesystem::path& file, const Tokenizer& tokenizer);

/// The tensor `input_ids` of a `.safetensors` file, or the only one: int64, windows [n, seq_len] or ids [num_tokens].
Tensor read_token_ids(const std::filesystem::path& file);

/// Throws c10::Error "`who`: ..." unless all ids are from 0 to vocab_size - 1.
void check_token_ids(const Tensor& ids, int64_t vocab_size, const std::string& who);

}  // namespace baseq

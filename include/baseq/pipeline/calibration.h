#pragma once

#include <filesystem>

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

/// Text of a file, JSONL or plain, tokenized: int64 [num_tokens].
Tensor tokenize_file(const std::filesystem::path& file, const Tokenizer& tokenizer);

}  // namespace baseq

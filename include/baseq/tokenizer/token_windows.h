#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "baseq/tensor.h"
#include "baseq/tokenizer/tokenizer.h"

/// Texts and files as token ids, and windows of them: the one place where either is cut.
///
///     const Tokenizer tokenizer = open_tokenizer("SmolLM2-135M-Instruct");
///     const Tensor ids = tokenize_file("wikitext2-test.txt", tokenizer);
///     evaluate(model, split_windows(ids, 2048), nullptr);
#pragma GCC visibility push(default)
namespace baseq {

/// The ids of a text as a batch of one, int64 [1, num_tokens]: what Model::logits takes. Throws as Tokenizer::encode.
Tensor token_ids(const Tokenizer& tokenizer, std::string_view text);

/// Text of a file, tokenized: int64 [num_tokens]. Of a .jsonl file the "text" of each line, joined by two newlines,
/// else the whole file as UTF-8 without a byte order mark. Throws c10::Error naming the file, also for .json and
/// .parquet, which are hardly meant as text.
Tensor tokenize_file(const std::filesystem::path& file, const Tokenizer& tokenizer);

/// The tensor `input_ids` of a `.safetensors` file, or the only one: int64, windows [n, seq_len] or ids [num_tokens].
Tensor read_token_ids(const std::filesystem::path& file);

/// Throws c10::Error "`who`: ..." unless all ids are from 0 to vocab_size - 1.
void check_token_ids(const Tensor& ids, int64_t vocab_size, const std::string& who);

/// Non-overlapping windows of `ids` (any shape, read as one text): a view [n, seq_len]; the tail is dropped.
/// @param max_windows 0: all
/// Throws c10::Error when there are fewer than `seq_len` ids.
Tensor split_windows(const Tensor& ids, int64_t seq_len, int64_t max_windows = 0);

/// Windows at random positions of `ids` [num_tokens], chosen by the seed: [num_windows, seq_len], which may overlap.
/// Throws c10::Error "`who`: ..." when there are fewer than `seq_len` ids.
Tensor draw_windows(const Tensor& ids, int64_t num_windows, int64_t seq_len, uint64_t seed, const std::string& who);

}  // namespace baseq
#pragma GCC visibility pop

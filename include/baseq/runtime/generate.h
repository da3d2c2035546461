#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "baseq/runtime/sampler.h"
#include "baseq/tensor.h"
#include "baseq/tokenizer/tokenizer.h"

#pragma GCC visibility push(default)
namespace baseq {

/// The logits, float32 [vocab_size], of the token that follows `sequence`: Session::next_logits, or anything else. An
/// undefined tensor ends the generation as cancelled.
using NextLogits = std::function<Tensor(std::span<const int32_t> sequence)>;

struct GenerateOptions {
  SamplingOptions sampling{};
  int64_t max_tokens = 256;
  int64_t context = INT64_MAX;      ///< tokens of the prompt and the answer together
  std::vector<std::string> stop{};  ///< texts that end the answer and are no part of it
  std::vector<int32_t> eos{};       ///< tokens that end it
  int64_t logprobs = -1;            ///< for each token so many of the most probable ones; -1: no log probabilities
};

/// What one token adds. Its text may be empty: a character takes several tokens, and a stop string is held back.
struct Piece {
  std::string text;  ///< valid UTF-8
  int32_t id = -1;   ///< -1: the last piece, text that was held back
  TokenLogprobs logprob;
};

enum class Finish {
  kEos,        ///< one of `eos`
  kStop,       ///< one of `stop`
  kLength,     ///< `max_tokens`
  kContext,    ///< `context`
  kCancelled,  ///< by `on_piece` or by the logits
};
/// "eos", "stop", "length", "context", "cancelled"
const char* name(Finish finish);

struct Answer {
  std::string text;          ///< of all pieces
  std::vector<int32_t> ids;  ///< all that were drawn, the one that ended it included
  std::vector<TokenLogprobs> logprobs;
  Finish finish = Finish::kLength;
};

/// Continues `prompt`, token ids, until something of the options ends it.
///   Session session(decoder, /*context=*/1024);
///   generate(session.logits(), tokenizer, tokenizer.encode("Once upon a time"), {}, print);
/// @param on_piece may be empty; returns false to end the answer
/// Throws c10::Error for an empty prompt, one that leaves no room in `context`, or an option out of range.
Answer generate(const NextLogits& next_logits, const Tokenizer& tokenizer, std::span<const int32_t> prompt,
                const GenerateOptions& options, const std::function<bool(const Piece&)>& on_piece = {});

}  // namespace baseq
#pragma GCC visibility pop

#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "baseq/io/checkpoint.h"
#include "baseq/model/decoder.h"
#include "baseq/tensor.h"
#include "baseq/tokenizer/tokenizer.h"

#pragma GCC visibility push(default)
namespace baseq {

/// How the next token is drawn from the logits. What a field's default says changes nothing.
struct SamplingOptions {
  double temperature = 1.0;  ///< logits are divided by it; 0: the most probable token, the lowest id of equal ones
  int64_t top_k = 0;         ///< only so many of the most probable tokens; 0: all
  double top_p = 1.0;        ///< only the fewest most probable tokens that have this probability together
  double min_p = 0.0;        ///< only tokens with this share of the largest probability
  double repetition_penalty =
      1.0;  ///< of tokens that are there: logits > 0 divided by it, others times it (1909.05858)
  uint64_t seed = 0;

  /// Throws c10::Error naming the field that is out of range.
  void check() const;
};

/// The token that follows `sequence`: penalty, temperature, top_k, top_p, min_p, then a draw that depends on the seed
/// and the position alone. Of equal logits, top_k and top_p prefer the lower id.
/// @param logits float32 [vocab_size] on the CPU; throws c10::Error when one is NaN or +inf
/// @param sequence all tokens before it, the prompt included
int32_t sample(const Tensor& logits, std::span<const int32_t> sequence, const SamplingOptions& options);

/// A number from 0 to 1, 1 excluded, for one position of a sequence: Philox4x32-10 (Salmon et al., 2011) with the seed
/// as key.
double random_unit(uint64_t seed, uint64_t position);

/// A token's log probability under the model, and those of the most probable tokens.
struct TokenLogprobs {
  int32_t id = 0;
  double logprob = 0;
  std::vector<std::pair<int32_t, double>> top{};  ///< the most probable first, of equal ones the lower id
};
/// @param logits float32 [vocab_size] on the CPU, as the model gives them: no penalty, no temperature
TokenLogprobs token_logprobs(const Tensor& logits, int32_t id, int64_t top);

/// What a checkpoint says about how to generate with it.
struct GenerationConfig {
  /// temperature, top_k, top_p, min_p and repetition_penalty of generation_config.json. Without "do_sample" the
  /// temperature is 0, as in transformers; what the file does not say is at the value that changes nothing.
  SamplingOptions sampling{.temperature = 0};
  std::vector<int32_t> eos{};  ///< eos_token_id, one or several, of that file or else of config.json
};
/// Throws c10::Error naming the file and the value that is malformed or out of range.
GenerationConfig read_generation_config(const Checkpoint& checkpoint);

/// The logits, float32 [vocab_size], of the token that follows `sequence`: Session::next_logits, or anything else. An
/// undefined tensor ends the generation as cancelled.
using NextLogits = std::function<Tensor(std::span<const int32_t> sequence)>;

/// One sequence of tokens in a resident model: remembers the keys and values of what it has seen, so that a
/// conversation, or the next token, costs only what is new.
///   const Decoder decoder = Model(open_model(path)).load();
///   Session session(decoder, {.context = 4096});
///   generate(session.logits(), open_tokenizer(path), prompt, options);
class Session {
 public:
  struct Options {
    int64_t context = 0;                ///< tokens at most
    int64_t tokens_per_pass = 512;      ///< of a prompt; changes no bit of the result
    std::function<bool()> cancelled{};  ///< asked between two passes; may be empty
  };
  /// @param decoder must outlive this session
  Session(const Decoder& decoder, Options options);

  /// Logits, float32 [vocab_size] on the CPU, of the token that follows `sequence`. Computes what differs from the last
  /// call's sequence. Undefined when it was cancelled; the next call resumes. Throws c10::Error for a sequence that is
  /// empty or longer than the context, and for an id that the model does not have.
  Tensor next_logits(std::span<const int32_t> sequence);
  /// The same as a function, which must not outlive this session.
  NextLogits logits() {
    return [this](std::span<const int32_t> sequence) { return next_logits(sequence); };
  }
  int64_t cache_bytes() const { return cache_.bytes(); }

 private:
  const Decoder& decoder_;
  Options options_;
  KvCache cache_;
  std::vector<int32_t> seen_;  ///< the tokens of the cache
};

/// The memory that a model will need once it is loaded, in bytes, an estimate from its config: weights, `sequences`
/// caches of `context` tokens, one pass.
int64_t resident_memory(const Model& model, const LoadOptions& options, int64_t context, int64_t sequences = 1);

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
  std::string text{};  ///< valid UTF-8
  int32_t id = -1;     ///< -1: the last piece, text that was held back
  TokenLogprobs logprob{};
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
  std::string text{};          ///< of all pieces
  std::vector<int32_t> ids{};  ///< all that were drawn, the one that ended it included
  std::vector<TokenLogprobs> logprobs{};
  Finish finish = Finish::kLength;
};

/// Continues `prompt`, token ids, until something of the options ends it.
///   Session session(decoder, {.context = 1024});
///   generate(session.logits(), tokenizer, tokenizer.encode("Once upon a time"), {}, print);
/// @param on_piece may be empty; returns false to end the answer
/// Throws c10::Error for an empty prompt, one that leaves no room in `context`, or an option out of range.
Answer generate(const NextLogits& next_logits, const Tokenizer& tokenizer, std::span<const int32_t> prompt,
                const GenerateOptions& options, const std::function<bool(const Piece&)>& on_piece = {});

}  // namespace baseq
#pragma GCC visibility pop

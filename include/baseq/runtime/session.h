#pragma once

#include <functional>
#include <span>
#include <vector>

#include "baseq/model/decoder.h"
#include "baseq/runtime/generate.h"

#pragma GCC visibility push(default)
namespace baseq {

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

}  // namespace baseq
#pragma GCC visibility pop

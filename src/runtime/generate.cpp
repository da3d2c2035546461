#include "baseq/runtime/generate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "text_stream.h"

namespace baseq {
namespace {

void check(std::span<const int32_t> prompt, const GenerateOptions& options) {
  options.sampling.check();
  TORCH_CHECK(!prompt.empty(), "the prompt is empty");
  TORCH_CHECK(options.max_tokens > 0, "`max_tokens` is ", options.max_tokens, "; expected at least 1");
  const auto length = static_cast<int64_t>(prompt.size());
  TORCH_CHECK(length < options.context, "the prompt has ", length, " tokens and leaves no room in a context of ",
              options.context);
}

/// Collects an answer and hands its pieces on.
class AnswerWriter {
 public:
  AnswerWriter(const Tokenizer& tokenizer, const GenerateOptions& options,
               const std::function<bool(const Piece&)>& on_piece)
      : text_(tokenizer), stops_(options.stop), on_piece_(on_piece) {}

  /// What ends the answer with this token, if anything does.
  std::optional<Finish> push(Piece piece, bool is_eos, bool with_logprobs) {
    answer_.ids.push_back(piece.id);
    if (with_logprobs) answer_.logprobs.push_back(piece.logprob);
    if (!is_eos) piece.text = stops_.push(text_.push(piece.id));
    const bool wanted = give(piece);
    if (is_eos) return Finish::kEos;
    if (stops_.found()) return Finish::kStop;
    return wanted ? std::nullopt : std::optional(Finish::kCancelled);
  }

  Answer finish(Finish finish) {
    answer_.finish = finish;
    Piece last{.text = stops_.push(text_.finish())};
    last.text += stops_.finish();
    if (stops_.found()) answer_.finish = Finish::kStop;
    if (!last.text.empty()) give(last);
    return std::move(answer_);
  }

 private:
  bool give(const Piece& piece) {
    answer_.text += piece.text;
    return !on_piece_ || on_piece_(piece);
  }
  Answer answer_;
  TextStream text_;
  StopStrings stops_;
  const std::function<bool(const Piece&)>& on_piece_;
};

}  // namespace

const char* name(Finish finish) {
  constexpr const char* kNames[] = {"eos", "stop", "length", "context", "cancelled"};
  return kNames[static_cast<size_t>(finish)];
}

Answer generate(const NextLogits& next_logits, const Tokenizer& tokenizer, std::span<const int32_t> prompt,
                const GenerateOptions& options, const std::function<bool(const Piece&)>& on_piece) {
  check(prompt, options);
  AnswerWriter writer(tokenizer, options, on_piece);
  std::vector<int32_t> sequence(prompt.begin(), prompt.end());
  for (int64_t count = 0; count < options.max_tokens; ++count) {
    if (static_cast<int64_t>(sequence.size()) >= options.context) return writer.finish(Finish::kContext);
    const Tensor logits = next_logits(sequence);
    if (!logits.defined()) return writer.finish(Finish::kCancelled);
    Piece piece{.id = sample(logits, sequence, options.sampling)};
    if (options.logprobs >= 0) piece.logprob = token_logprobs(logits, piece.id, options.logprobs);
    sequence.push_back(piece.id);
    const bool is_eos = std::ranges::find(options.eos, piece.id) != options.eos.end();
    if (const auto finish = writer.push(std::move(piece), is_eos, options.logprobs >= 0)) return writer.finish(*finish);
  }
  return writer.finish(Finish::kLength);
}

}  // namespace baseq

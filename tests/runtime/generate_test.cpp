#include "baseq/runtime/generate.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "../random_tensors.h"
#include "../tokenizer/tiny_tokenizer.h"

namespace baseq {
namespace {

using test::Ids;

constexpr int64_t kVocab = 256;

// A model that says `text` behind a prompt of `prompt` tokens, byte for byte, and then the byte 0.
NextLogits says(const std::string& text, size_t prompt) {
  return [text, prompt](std::span<const int32_t> sequence) {
    const size_t at = sequence.size() - prompt;
    Tensor logits = at::zeros({kVocab});
    logits[at < text.size() ? static_cast<uint8_t>(text[at]) : 0] = 10;
    return logits;
  };
}

// Logits that depend on all of the sequence.
Tensor mixed_logits(std::span<const int32_t> sequence) {
  uint64_t hash = 1;
  for (const int32_t id : sequence) hash = hash * 1000003 + static_cast<uint64_t>(id);
  return test::random_normal({kVocab}, hash % 100000).to(at::kFloat);
}

class Generate : public testing::Test {
 protected:
  Answer answer(const std::string& text, GenerateOptions options,
                const std::function<bool(const Piece&)>& on_piece = {}) {
    options.sampling.temperature = 0;
    return generate(says(text, prompt.size()), tokenizer, prompt, options, on_piece);
  }
  const Tokenizer tokenizer = test::load(test::byte_fallback_tokenizer());
  const Ids prompt{1, 2, 3};
};

TEST_F(Generate, EndsWithTheFirstReasonToEnd) {
  EXPECT_EQ(answer("abc", {.max_tokens = 2}).text, "ab");
  EXPECT_EQ(answer("abc", {.max_tokens = 2}).finish, Finish::kLength);
  const Answer eos = answer("abc", {.eos = {9, 'c'}});
  EXPECT_EQ(eos.text, "ab");
  EXPECT_EQ(eos.finish, Finish::kEos);
  EXPECT_EQ(eos.ids, (Ids{'a', 'b', 'c'}));
  const Answer context = answer("abc", {.context = 5});
  EXPECT_EQ(context.text, "ab");
  EXPECT_EQ(context.finish, Finish::kContext);
  EXPECT_EQ(answer("ab END c", {.stop = {"END"}}).text, "ab ");
  EXPECT_EQ(answer("ab END c", {.stop = {"END"}}).finish, Finish::kStop);
  // Text that was held back is part of the answer when no stop string came of it.
  EXPECT_EQ(answer("ab EN", {.max_tokens = 5, .stop = {"END"}}).text, "ab EN");
}

TEST_F(Generate, PiecesAreTheAnswer) {
  std::string streamed;
  size_t calls = 0;
  const Answer whole = answer("größe 😀 END", {.max_tokens = 50, .stop = {"END"}}, [&](const Piece& piece) {
    EXPECT_TRUE(piece.text.empty() || static_cast<uint8_t>(piece.text[0]) < 0x80 ||
                static_cast<uint8_t>(piece.text[0]) >= 0xC0);
    streamed += piece.text;
    ++calls;
    return true;
  });
  EXPECT_EQ(streamed, whole.text);
  EXPECT_EQ(whole.text, "größe 😀 ");
  EXPECT_GE(calls, whole.ids.size());
}

TEST_F(Generate, CanBeCancelledByItsReaderAndByTheLogits) {
  int left = 2;
  const Answer cancelled = answer("abcdef", {}, [&](const Piece&) { return --left > 0; });
  EXPECT_EQ(cancelled.finish, Finish::kCancelled);
  EXPECT_EQ(cancelled.ids.size(), 2U);
  const Answer stopped = generate([](std::span<const int32_t>) { return Tensor(); }, tokenizer, prompt, {});
  EXPECT_EQ(stopped.finish, Finish::kCancelled);
  EXPECT_TRUE(stopped.ids.empty());
}

TEST_F(Generate, ATokenDependsOnSeedAndSequenceAlone) {
  const GenerateOptions options{.sampling = {.temperature = 1.5, .seed = 11}, .max_tokens = 40};
  const Answer whole = generate(mixed_logits, tokenizer, prompt, options);
  Ids longer = prompt;
  longer.insert(longer.end(), whole.ids.begin(), whole.ids.begin() + 25);
  const Answer rest = generate(mixed_logits, tokenizer, longer, {.sampling = options.sampling, .max_tokens = 15});
  EXPECT_EQ(rest.ids, Ids(whole.ids.begin() + 25, whole.ids.end()));
  const Answer other =
      generate(mixed_logits, tokenizer, prompt, {.sampling = {.temperature = 1.5, .seed = 12}, .max_tokens = 40});
  EXPECT_NE(other.ids, whole.ids);
}

TEST_F(Generate, GivesLogProbabilitiesOfEachToken) {
  const Answer whole = generate(mixed_logits, tokenizer, prompt, {.max_tokens = 5, .logprobs = 3});
  ASSERT_EQ(whole.logprobs.size(), 5U);
  Ids sequence = prompt;
  for (size_t i = 0; i < 5; ++i) {
    const Tensor expected = at::log_softmax(mixed_logits(sequence).to(at::kDouble), 0);
    EXPECT_EQ(whole.logprobs[i].id, whole.ids[i]);
    EXPECT_NEAR(whole.logprobs[i].logprob, expected[whole.ids[i]].item<double>(), 1e-6);
    EXPECT_EQ(whole.logprobs[i].top.size(), 3U);
    sequence.push_back(whole.ids[i]);
  }
  EXPECT_TRUE(answer("a", {.max_tokens = 1}).logprobs.empty());
}

TEST_F(Generate, RefusesAPromptWithoutTokensOrRoom) {
  const auto error = [&](const Ids& ids, const GenerateOptions& options) {
    return test::error_of([&] { generate(mixed_logits, tokenizer, ids, options); });
  };
  EXPECT_EQ(error({}, {}), "the prompt is empty");
  EXPECT_EQ(error(prompt, {.context = 3}), "the prompt has 3 tokens and leaves no room in a context of 3");
  EXPECT_EQ(error(prompt, {.max_tokens = 0}), "`max_tokens` is 0; expected at least 1");
  EXPECT_EQ(error(prompt, {.sampling = {.top_p = 2}}), "`top_p` is 2; expected a number from 0 to 1");
}

}  // namespace
}  // namespace baseq

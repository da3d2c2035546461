#include <gtest/gtest.h>

#include "../io/temp_directory.h"
#include "../tiny_model.h"
#include "../tokenizer/tiny_tokenizer.h"
#include "baseq/formats/open_model.h"
#include "baseq/runtime/generate.h"

namespace baseq {
namespace {

using test::Ids;

class SessionTest : public testing::Test {
 protected:
  static StoredModel tiny_model(const std::filesystem::path& path) {
    test::write_checkpoint(path, test::TinyShape{});
    return open_model(path);
  }
  /// The same without any cache.
  Tensor expected(const Ids& sequence) const {
    return model.logits(at::tensor(std::vector<int64_t>(sequence.begin(), sequence.end())).view({1, -1}))[0][-1];
  }
  static Ids random_sequence(int64_t length, uint64_t seed) {
    const Tensor ids = test::random_ids({length}, 40, seed).to(at::kInt);
    return {ids.const_data_ptr<int32_t>(), ids.const_data_ptr<int32_t>() + length};
  }

  test::TempDirectory directory;
  const Model model{tiny_model(directory.path())};
  const Decoder decoder = model.load();
};

TEST_F(SessionTest, LogitsAreThoseOfTheWholeSequenceWhateverWasSeenBefore) {
  Session session(decoder, {.context = 64});
  Ids sequence = random_sequence(20, 1);
  const auto check = [&] { EXPECT_TRUE(at::allclose(session.next_logits(sequence), expected(sequence), 1e-4, 1e-5)); };
  check();
  check();  // nothing is new
  sequence.push_back(3);
  check();
  sequence[10] = (sequence[10] + 1) % 40;
  check();
  sequence.resize(5);
  check();
  sequence = random_sequence(64, 2);
  check();
}

TEST_F(SessionTest, PassesOfAnyLengthGiveTheSameLogits) {
  const Ids sequence = random_sequence(50, 3);
  Session whole(decoder, {.context = 50});
  const Tensor logits = whole.next_logits(sequence);
  for (const int64_t tokens : {1, 7, 49}) {
    Session session(decoder, {.context = 50, .tokens_per_pass = tokens});
    EXPECT_TRUE(at::allclose(session.next_logits(sequence), logits, 1e-4, 1e-5));
  }
}

TEST_F(SessionTest, ResumesWhatWasCancelled) {
  int left = 3;
  Session session(decoder, {.context = 50, .tokens_per_pass = 5, .cancelled = [&] { return --left < 0; }});
  const Ids sequence = random_sequence(30, 4);
  EXPECT_FALSE(session.next_logits(sequence).defined());
  left = 3;  // passes: what is missing of six
  EXPECT_TRUE(at::allclose(session.next_logits(sequence), expected(sequence), 1e-4, 1e-5));
}

TEST_F(SessionTest, RefusesWhatTheModelCannotTake) {
  Session session(decoder, {.context = 8});
  EXPECT_THROW(session.next_logits({}), c10::Error);
  EXPECT_THROW(session.next_logits(random_sequence(9, 5)), c10::Error);
  EXPECT_EQ(test::error_of([&] { session.next_logits(Ids{1, 40}); }), "token 40 but the model has 40");
  EXPECT_EQ(test::error_of([&] { session.next_logits(Ids{1, -1}); }), "token -1 but the model has 40");
  EXPECT_TRUE(session.next_logits(Ids{1, 39}).defined());
}

TEST_F(SessionTest, MemoryIsKnownBeforeTheModelIsLoaded) {
  const int64_t empty = resident_memory(model, {}, /*context=*/0);
  EXPECT_NEAR(static_cast<double>(empty), static_cast<double>(decoder.bytes()), 0.1 * static_cast<double>(empty));
  const int64_t more = resident_memory(model, {}, 1000, 3) - resident_memory(model, {}, 1000, 2);
  EXPECT_GE(more, 1000 * 2 * 2 * 2 * 8 * 4);  // keys and values of two blocks, two heads of 8
}

}  // namespace
}  // namespace baseq

#include "baseq/eval/evaluate.h"

#include <gtest/gtest.h>

#include "../cluster/thread_cluster.h"
#include "../counted_checkpoint.h"
#include "../tiny_model.h"

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;
using test::TinyShape;

/// Perplexity one token at a time, from the logits of the prefix alone, in float64.
double slow_perplexity(const Checkpoint& checkpoint, const Tensor& windows) {
  const Model model(checkpoint, {.dtype = at::kDouble});
  double loss = 0;
  int64_t count = 0;
  for (int64_t n = 0; n < windows.size(0); ++n) {
    for (int64_t t = 1; t < windows.size(1); ++t, ++count) {
      const Tensor logits = model.logits(windows[n].narrow(0, 0, t).unsqueeze(0))[0][t - 1];
      loss += (logits.exp().sum().log() - logits[windows[n][t].item<int64_t>()]).item<double>();
    }
  }
  return std::exp(loss / double(count));
}

struct TinyCheckpoint {
  explicit TinyCheckpoint(const TinyShape& shape, uint64_t seed = 1) {
    test::write_checkpoint(directory / "model", shape, seed);
    checkpoint.emplace(directory / "model");
  }
  TempDirectory directory;
  std::optional<Checkpoint> checkpoint;
};

TEST(Evaluate, PerplexityIsThatOfTheSlowReference) {
  for (const TinyShape& shape : test::tiny_shapes()) {
    SCOPED_TRACE(shape.name);
    const TinyCheckpoint tiny(shape);
    const Tensor windows = test::random_ids({3, 8}, shape.vocab_size, 4);
    const Evaluation result = evaluate(Model(*tiny.checkpoint), windows, nullptr);
    EXPECT_NEAR(result.perplexity / slow_perplexity(*tiny.checkpoint, windows), 1.0, 1e-5);
    EXPECT_EQ(result.num_tokens, 3 * 7);
    EXPECT_TRUE(std::isnan(result.mean_kl));
    EXPECT_TRUE(std::isnan(result.top1_agreement));
  }
}

TEST(Evaluate, WindowsLongerThanAChunkCountEveryTokenOnce) {
  const TinyShape shape{.num_layers = 1};
  const TinyCheckpoint tiny(shape);
  const Tensor windows = test::random_ids({2, 700}, shape.vocab_size, 4);
  const Model model(*tiny.checkpoint);
  const Tensor log_p = at::log_softmax(model.logits(windows).to(at::kDouble), -1).narrow(1, 0, 699);
  const Tensor picked = log_p.gather(2, windows.narrow(1, 1, 699).unsqueeze(2));
  const Evaluation result = evaluate(model, windows, nullptr);
  EXPECT_NEAR(result.perplexity / std::exp(-picked.mean().item<double>()), 1.0, 1e-5);
  EXPECT_EQ(result.num_tokens, 2 * 699);
}

TEST(Evaluate, AModelAgreesWithItself) {
  const TinyCheckpoint tiny({});
  const Model model(*tiny.checkpoint);
  Reference itself{model};
  const Evaluation result = evaluate(model, test::random_ids({2, 12}, 40, 4), &itself);
  EXPECT_EQ(result.mean_kl, 0.0);
  EXPECT_EQ(result.top1_agreement, 1.0);
}

TEST(Evaluate, KlAndAgreementAreThoseOfTheLogits) {
  const TinyCheckpoint tiny({}), other({}, 50);
  const Model model(*tiny.checkpoint), original(*other.checkpoint);
  Reference reference{original};
  const Tensor windows = test::random_ids({2, 12}, 40, 4);
  const auto log_probabilities = [&](const Checkpoint& checkpoint) {
    return at::log_softmax(Model(checkpoint, {.dtype = at::kDouble}).logits(windows), -1).narrow(1, 0, 11);
  };
  const Tensor p = log_probabilities(*tiny.checkpoint), r = log_probabilities(*other.checkpoint);
  const Evaluation result = evaluate(model, windows, &reference);
  EXPECT_NEAR(result.mean_kl, (r.exp() * (r - p)).sum(-1).mean().item<double>(), 1e-4);
  EXPECT_DOUBLE_EQ(result.top1_agreement, (p.argmax(-1) == r.argmax(-1)).to(at::kDouble).mean().item<double>());
  EXPECT_GT(result.mean_kl, 0.1);
}

TEST(Evaluate, AReferenceRunsOnceForModelsWithTheSameWindows) {
  const TinyCheckpoint tiny({}), third({}, 20), other({}, 50);
  const Model models[] = {Model(*tiny.checkpoint), Model(*third.checkpoint)};
  const test::CountedCheckpoint counted(*other.checkpoint);
  const Model original(counted.checkpoint());
  const std::string weight = "model.layers.0.mlp.up_proj.weight";
  const Tensor windows = test::random_ids({2, 12}, 40, 4);
  Reference reference{original};
  for (const Model& model : models) {
    int64_t last = 0;
    const Evaluation result = evaluate(model, windows, &reference, {.progress = [&](int64_t done, int64_t total) {
                                         last = done;
                                         EXPECT_EQ(total, &model == models ? 4 : 2);
                                       }});
    EXPECT_EQ(last, &model == models ? 4 : 2);
    const Model again(*other.checkpoint);
    Reference alone{again};
    const Evaluation expected = evaluate(model, windows, &alone);
    EXPECT_EQ(result.perplexity, expected.perplexity);
    EXPECT_EQ(result.mean_kl, expected.mean_kl);
    EXPECT_EQ(result.top1_agreement, expected.top1_agreement);
  }
  EXPECT_EQ(counted.reads(weight), 1);
  evaluate(models[0], windows.narrow(0, 0, 1), &reference);
  EXPECT_EQ(counted.reads(weight), 2) << "other windows are another run";
}

TEST(Evaluate, LogitsOfEveryTokenComeInOrderAndChangeNothing) {
  const TinyShape shape{.num_layers = 1};
  const TinyCheckpoint tiny(shape);
  const Model model(*tiny.checkpoint);
  const Tensor windows = test::random_ids({2, 700}, shape.vocab_size, 4);
  std::vector<Tensor> pieces;
  const Evaluation result = evaluate(model, windows, nullptr, {.logits = [&](const Tensor& logits) {
                                       EXPECT_LT(logits.size(0), 700);
                                       pieces.push_back(logits.clone());
                                     }});
  EXPECT_EQ(result.perplexity, evaluate(model, windows, nullptr).perplexity);
  const Tensor logits = at::cat(pieces);
  ASSERT_EQ(logits.sizes(), at::IntArrayRef({2 * 700, shape.vocab_size}));
  EXPECT_LT(test::relative_error(logits, model.logits(windows).flatten(0, 1)), 1e-6);
}

TEST(Evaluate, ReportsEveryBlockOfBothModels) {
  const TinyCheckpoint tiny({}), other({.num_layers = 3}, 50);
  const Model model(*tiny.checkpoint), original(*other.checkpoint);
  Reference reference{original};
  std::vector<int64_t> done;
  evaluate(model, test::random_ids({1, 4}, 40, 4), &reference, {.progress = [&](int64_t blocks, int64_t total) {
             done.push_back(blocks);
             EXPECT_EQ(total, 5);
           }});
  EXPECT_EQ(done, (std::vector<int64_t>{1, 2, 3, 4, 5}));
}

/// evaluate() of a model in which one value of one tensor is NaN or too large, and of a sound reference.
Evaluation evaluate_with(const std::string& name, double value, bool as_reference = false) {
  const TempDirectory directory;
  auto tensors = test::tiny_tensors({}, 1);
  tensors.at(name) = tensors.at(name).clone();
  tensors.at(name).flatten()[3] = value;
  test::write_checkpoint(directory / "broken", test::tiny_config({}), tensors);
  const Checkpoint broken(directory / "broken");
  const TinyCheckpoint sound({});
  const Model one(broken), other(*sound.checkpoint);
  // Only the second window has token 0, whose row of the embedding holds the value.
  const Tensor windows = at::tensor({7, 7, 7, 7, 0, 1, 2, 3}, at::kLong).view({2, 4});
  Reference reference{as_reference ? one : other};
  const Model& model = as_reference ? other : one;
  const Evaluation first = evaluate(model, windows, &reference);
  // Whose hidden states are kept for the next model says the same of it.
  EXPECT_EQ(evaluate(model, windows, &reference).reference_not_finite, first.reference_not_finite);
  return first;
}

TEST(Evaluate, SaysWhereValuesStopBeingFinite) {
  const auto expect = [](const std::string& name, double value, std::initializer_list<const char*> parts) {
    SCOPED_TRACE(name);
    const Evaluation result = evaluate_with(name, value);
    for (const char* part : parts) EXPECT_NE(result.not_finite.find(part), std::string::npos) << result.not_finite;
    EXPECT_TRUE(std::isnan(result.perplexity));
    EXPECT_TRUE(std::isnan(result.mean_kl));
    EXPECT_TRUE(std::isnan(result.top1_agreement));
    EXPECT_TRUE(result.reference_not_finite.empty());
  };
  expect("model.layers.1.mlp.up_proj.weight", NAN,
         {"in model.layers.1, first in window 1 of 2", "model.layers.1.mlp.up_proj.weight holds NaN"});
  expect("model.embed_tokens.weight", INFINITY, {"in the embedding, first in window 2", "model.embed_tokens.weight"});
  expect("model.norm.weight", NAN, {"in the final norm", "model.norm.weight"});
  expect("model.layers.0.self_attn.q_proj.weight", 3e38, {"in model.layers.0", "activations overflow"});
}

TEST(Evaluate, AReferenceThatIsNotFiniteSpoilsOnlyTheComparison) {
  const Evaluation result = evaluate_with("model.layers.0.mlp.down_proj.weight", NAN, /*as_reference=*/true);
  EXPECT_TRUE(result.not_finite.empty());
  EXPECT_NE(result.reference_not_finite.find("model.layers.0.mlp.down_proj.weight"), std::string::npos);
  EXPECT_TRUE(std::isfinite(result.perplexity));
  EXPECT_TRUE(std::isnan(result.mean_kl));
  EXPECT_TRUE(std::isnan(result.top1_agreement));
}

TEST(Evaluate, ProcessesThatShareTheWindowsGetTheResultOfOne) {
  const TinyCheckpoint tiny({}), other({}, 50);
  const Tensor windows = test::random_ids({7, 600}, 40, 4);
  const auto evaluated = [&](const Communicator& communicator) {
    const Model model(*tiny.checkpoint), original(*other.checkpoint);
    Reference reference{original};
    const EvaluateOptions options{.communicator = communicator};
    evaluate(model, windows, &reference, options);
    return evaluate(model, windows, &reference, options);  // the reference is known by now
  };
  Evaluation alone;
  test::ThreadCluster(1).run([&](const Communicator& communicator) { alone = evaluated(communicator); });
  for (const int64_t size : {2, 3, 7}) {
    test::ThreadCluster(size).run([&](const Communicator& communicator) {
      const Evaluation shared = evaluated(communicator);
      EXPECT_EQ(shared.perplexity, alone.perplexity);
      EXPECT_EQ(shared.mean_kl, alone.mean_kl);
      EXPECT_EQ(shared.top1_agreement, alone.top1_agreement);
      EXPECT_EQ(shared.num_tokens, alone.num_tokens);
    });
  }
}

TEST(Evaluate, TheFirstPlaceOfAllProcessesIsNamed) {
  const TinyShape shape;
  const TempDirectory directory;
  auto tensors = test::tiny_tensors(shape, 1);
  tensors["model.embed_tokens.weight"][7].fill_(INFINITY);
  test::write_checkpoint(directory / "model", test::tiny_config(shape), tensors);
  Tensor windows = test::random_ids({4, 8}, 7, 4);
  windows[2][5] = 7;
  test::ThreadCluster(3).run([&](const Communicator& communicator) {
    const Model model{Checkpoint(directory / "model")};
    const Evaluation result = evaluate(model, windows, nullptr, {.communicator = communicator});
    EXPECT_NE(result.not_finite.find("in the embedding, first in window 3 of 4"), std::string::npos)
        << result.not_finite;
    EXPECT_TRUE(std::isnan(result.perplexity));
  });
}

TEST(Evaluate, RefusesWhatItCannotCompare) {
  const TinyCheckpoint tiny({}), other({.vocab_size = 41});
  const Model model(*tiny.checkpoint), original(*other.checkpoint);
  Reference reference{original};
  const Tensor windows = test::random_ids({1, 4}, 40, 4);
  expect_error([&] { evaluate(model, windows, &reference); }, {"41", "40"});
  expect_error([&] { evaluate(model, windows.narrow(1, 0, 1), nullptr); }, {"windows"});
  expect_error([&] { evaluate(model, windows.flatten(), nullptr); }, {"windows"});
}

}  // namespace
}  // namespace baseq

#include "report/verdict.h"

#include <gtest/gtest.h>

namespace baseq {
namespace {

/// Three blocks of two linears, whose errors are alike, and a stream whose error grows alike.
Report even_report() {
  Report report;
  report.summary.name = "out";
  report.summary.weights = "4 bits, symmetric, per group of 64";
  report.run.started = RunStarted{.model = "tiny", .num_blocks = 3, .num_samples = 128, .seq_len = 512};
  for (int64_t i = 0; i < 3; ++i) {
    BlockRecord& block = report.run.blocks[i];
    for (const char* name : {"self_attn.q_proj", "mlp.down_proj"}) {
      block.linears.push_back({.block = i, .name = name, .relative_error = 0.01, .damping = 0, .seconds = 1});
    }
    block.finished = BlockFinished{i, 3, 0.001 * static_cast<double>(i + 1), 1.0};
  }
  return report;
}

TEST(Verdict, SaysWhatIsNotKnown) {
  const auto [good, bad, help] = verdict(Report{});
  EXPECT_NE(good.find("was not measured"), good.npos);
  EXPECT_NE(bad.find("is not known"), bad.npos);
  EXPECT_NE(help.find("is not known"), help.npos);
}

TEST(Verdict, ComparesWithTheOriginalOfTheSameWindows) {
  Report report = even_report();
  report.results = {{{"model", "/there/out"},
                     {"perplexity", 22.0},
                     {"num_windows", 5},
                     {"seq_len", 64},
                     {"mean_kl", 0.05},
                     {"top1_agreement", 0.9}},
                    {{"model", "tiny"}, {"perplexity", 10.0}, {"num_windows", 9}, {"seq_len", 64}}};
  EXPECT_EQ(verdict(report)[0],
            "Its perplexity is 22.00; its best guess is the original's for 90.0 % of the tokens (mean KL divergence "
            "0.0500).");
  report.results.push_back({{"model", "tiny"}, {"perplexity", 20.0}, {"num_windows", 5}, {"seq_len", 64}});
  EXPECT_NE(verdict(report)[0].find("22.00, +10.0 % beside the original's 20.00;"), std::string::npos);
  report.results[0]["perplexity"] = nullptr;
  EXPECT_NE(verdict(report)[0].find("was not measured"), std::string::npos);
}

TEST(Verdict, NamesTheWorstLinearAndTheBlockThatAddsMost) {
  Report report = even_report();
  report.run.blocks[1].linears[1].relative_error = 0.03;
  report.run.blocks[2].finished->relative_error = 0.009;
  EXPECT_EQ(
      verdict(report)[1],
      "The error of the residual stream grows most in block 2, from 0.0020 to 0.0090; mlp.down_proj of block 1 has "
      "the largest error of the linears, 0.03 beside a median of 0.01.");
}

TEST(Verdict, SaysWhatWouldHelpFirst) {
  Report report = even_report();
  const auto help = [&] { return verdict(report)[2]; };
  EXPECT_NE(help().find("more bits, or a recipe that learns"), std::string::npos);
  report.run.started->num_samples = 16;
  EXPECT_NE(help().find("it saw 8192 tokens"), std::string::npos);
  report.summary.weights = "4 bits, symmetric, per channel";
  EXPECT_NE(help().find("Scales of groups"), std::string::npos);
  report.run.blocks[1].linears[1].relative_error = 0.05;
  EXPECT_NE(help().find("\"model.layers.1.mlp.down_proj\""), std::string::npos);
  report.run.started->num_samples = 0;
  EXPECT_NE(help().find("Calibration would help"), std::string::npos);
}

}  // namespace
}  // namespace baseq

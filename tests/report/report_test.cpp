#include "report/report.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "../job_of.h"
#include "../tiny_model.h"
#include "baseq/pipeline/job.h"
#include "report/html.h"
#include "report/svg_chart.h"
#include "report/whole_model.h"

namespace baseq {
namespace {

int64_t count(const std::string& text, const std::string& part) {
  int64_t found = 0;
  for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + part.size())) ++found;
  return found;
}

TEST(Html, WhatHasAMeaningIsEscaped) {
  EXPECT_EQ(escape_html("<b a=\"1\" c='2'>&"), "&lt;b a=&quot;1&quot; c=&#39;2&#39;&gt;&amp;");
  EXPECT_EQ(escape_html("caf\u00e9\t\n"), "caf\u00e9\t\n");
  EXPECT_EQ(escape_html(std::string_view("a\0\x1b\x7f", 4)), "a\x7f");
  EXPECT_EQ(escape_html("a\xff"), "a\ufffd");
}

TEST(Html, CellsOfATableAreEscaped) {
  HtmlTable table({"<h>", "n"});
  EXPECT_TRUE(table.empty());
  table.row({"<r>", "<1>"});
  EXPECT_FALSE(table.empty());
  const std::string html = table.html();
  EXPECT_EQ(count(html, "&lt;"), 3);
  EXPECT_NE(html.find("<td class=\"number\">&lt;1&gt;</td>"), html.npos);
}

TEST(LineChart, GapsWhereAValueIsMissing) {
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  const std::string svg = to_svg(LineChart{.title = "t<",
                                           .x_label = "block",
                                           .y_label = "",
                                           .x = {"0", "1", "2", "3", "4", "5"},
                                           .series = {{"s&", {1, 2, nan, infinity, 1e300, 3}}}});
  EXPECT_EQ(count(svg, "<circle"), 3);
  EXPECT_EQ(count(svg, "M"), 2);
  EXPECT_EQ(svg.find("nan"), svg.npos);
  EXPECT_EQ(svg.find("inf"), svg.npos);
  EXPECT_NE(svg.find("t&lt;"), svg.npos);
}

TEST(LineChart, IsDrawnForAnyValues) {
  const double values[] = {0, -1e29, 1e-300, -1, 5e-324, 1e29, 7};
  for (const double a : values) {
    for (const double b : values) {
      const std::string svg = to_svg(
          LineChart{.title = "", .x_label = "", .y_label = "", .x = {"0", "1"}, .series = {{"", {a, b}}, {"", {}}}});
      EXPECT_EQ(svg.find("nan"), svg.npos) << a << " " << b;
      EXPECT_EQ(svg.find("inf"), svg.npos) << a << " " << b;
      EXPECT_EQ(count(svg, "<circle"), 2);
      EXPECT_LT(count(svg, "class=\"grid\""), 30) << a << " " << b;
    }
  }
  EXPECT_NO_THROW(to_svg(LineChart{}));
}

TEST(LineChart, TheAxisIsLogarithmicForAWideRange) {
  const auto chart = [](double last) {
    return to_svg(
        LineChart{.title = "", .x_label = "", .y_label = "", .x = {"first", "second"}, .series = {{"", {1, last}}}});
  };
  EXPECT_EQ(chart(2).find(">0.1<"), std::string::npos);
  EXPECT_NE(chart(2).find(">0<"), std::string::npos);  // a linear axis begins at zero
  EXPECT_EQ(chart(1000).find(">0<"), std::string::npos);
  EXPECT_NE(chart(1000).find(">10<"), std::string::npos);
}

TEST(HeatMap, CellsAreDarkerTheLargerTheyAre) {
  const std::string svg = to_svg(HeatMap{
      .title = "", .x_label = "block", .x = {"0", "1", "2"}, .y = {"a"}, .values = {{0.01, std::nan(""), 1.0}}});
  EXPECT_EQ(count(svg, "class=\"heat\""), 2);
  EXPECT_NE(svg.find("fill-opacity=\"0.080\"><title>a, block 0: 0.01"), svg.npos);
  EXPECT_NE(svg.find("fill-opacity=\"1.000\"><title>a, block 2: 1"), svg.npos);
  EXPECT_NO_THROW(to_svg(HeatMap{}));
}

TEST(Report, OfWhateverConfigAndEvents) {
  Report report;
  EXPECT_NO_THROW(html_report(report));
  report.config = {{"architectures", 5}, {"hidden_size", {1, 2}}, {"quantization_config", {{"recipe", "<r>"}}}};
  report.summary.name = "<&>";
  report.results = {{{"model", "<x>"}, {"perplexity", nullptr}}};
  report.run.add(LinearRounded{-3, "<q>", -1, 0, 0});
  report.run.add(StageLearned{7, "<s>", 0, 0, 0});
  report.run.add(PointMeasured{.block = 2, .name = "<n>", .before = {}, .after = {}, .enabled = true});
  report.run.add(Warning{"<w>"});
  const std::string html = html_report(report);
  for (const char* name : {"<q>", "<s>", "<n>", "<r>", "<w>", "<x>", "<&>"}) EXPECT_EQ(count(html, name), 0) << name;
  EXPECT_NE(html.find("&lt;q&gt;"), html.npos);
}

TEST(Report, ShowsTheLossOfPassesOverTheModel) {
  RunRecord run;
  EXPECT_EQ(whole_model_section(run), "");
  run.add(EpochLearned{kWholeModel, "tuning", 1, 1, 0.25});
  run.add(StageLearned{kWholeModel, "tuning", 0.5, 0.25, 3});
  const std::string html = whole_model_section(run);
  for (const char* part : {"Loss of tuning", "epoch", "0.25", "0.5"}) {
    EXPECT_NE(html.find(part), std::string::npos) << part;
  }
}

TEST(CheckpointSummary, BitsAWeightCountScalesAndZeroPoints) {
  test::TempDirectory directory;
  const test::TinyShape shape;
  test::write_checkpoint(directory / "in", shape);
  const Checkpoint original(directory / "in");
  EXPECT_EQ(summarize(Model(original)).bits_per_weight, 32);
  Recipe recipe{.name = "mine"};
  recipe.grids.weights = QuantSpec{.symmetric = false, .strategy = Strategy::kGroup, .group_size = 8};
  recipe.passes[0].steps = {RoundStep{}};
  quantize(test::job_of(original, recipe, {}, directory / "out"));
  const Checkpoint quantized(directory / "out" / "");
  const CheckpointSummary summary = summarize(Model(quantized));
  EXPECT_EQ(summary.name, "out");
  EXPECT_EQ(summary.recipe, "mine");
  EXPECT_EQ(summary.weights, "4 bits, asymmetric, per group of 8");
  EXPECT_EQ(summary.kv_cache, "full precision");
  // 4 bits of code, and of each 8 weights a float32 scale and a zero point of 4 bits.
  EXPECT_DOUBLE_EQ(summary.bits_per_weight, 4 + 36.0 / 8);
  EXPECT_EQ(summary.linears.size(), 14U);
  for (const auto& [linear, stored] : summary.linears) EXPECT_DOUBLE_EQ(stored.per_weight(), 4 + 36.0 / 8) << linear;
}

TEST(Report, ShowsTheBitsOfEachLinearWhereTheyDiffer) {
  Report report;
  report.summary.linears = {{"model.layers.0.mlp.up_proj", {450, 100}}, {"model.layers.1.mlp.up_proj", {450, 100}}};
  EXPECT_EQ(count(html_report(report), "Bits a weight"), 0);
  report.summary.uniform = false;
  report.summary.linears["model.layers.11.mlp.<up>"] = {825, 100};
  report.summary.linears["strange"] = {1, 0};
  const std::string html = html_report(report);
  EXPECT_GT(count(html, "Bits a weight"), 0);
  EXPECT_NE(html.find("4.500"), html.npos);
  EXPECT_NE(html.find("8.250"), html.npos);
  EXPECT_EQ(count(html, "<up>"), 0);
}

}  // namespace
}  // namespace baseq

#include "report/verdict.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "io/hub_cache.h"

namespace baseq {
namespace {

using nlohmann::json;

/// Few tokens for a Hessian: the recipes of configs/ take 8192, and four times as many still help (README, Results).
constexpr int64_t kFewTokens = 32768;
/// A linear whose error is so many times the median is worth bits of its own.
constexpr double kOutlier = 4;

/// NaN where there is none.
double number(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : std::nan("");
}

bool is_about(const json& result, const std::string& name) {
  const auto model = result.find("model");
  return model != result.end() && model->is_string() && model_name(model->get<std::string>()) == name;
}

/// The perplexity that was measured of a model on the same windows as `other`; NaN where there is none.
double perplexity_of(const Report& report, const std::string& name, const json& other) {
  for (const json& result : report.results) {
    const bool same = result.value("num_windows", json()) == other.value("num_windows", json()) &&
                      result.value("seq_len", json()) == other.value("seq_len", json());
    if (same && is_about(result, name)) return number(result, "perplexity");
  }
  return std::nan("");
}

std::string how_good(const Report& report) {
  for (const json& result : report.results) {
    const double perplexity = number(result, "perplexity"), kl = number(result, "mean_kl"),
                 top1 = number(result, "top1_agreement");
    if (!is_about(result, report.summary.name) || !std::isfinite(perplexity)) continue;
    const double original =
        report.run.started ? perplexity_of(report, report.run.started->model, result) : std::nan("");
    std::string text = fmt::format("Its perplexity is {:.2f}", perplexity);
    if (std::isfinite(original)) {
      text += fmt::format(", {:+.1f} % beside the original's {:.2f}", (perplexity / original - 1) * 100, original);
    }
    if (std::isfinite(top1)) {
      text += fmt::format("; its best guess is the original's for {:.1f} % of the tokens", 100 * top1);
    }
    if (std::isfinite(kl)) text += fmt::format(" (mean KL divergence {:.4f})", kl);
    return text + ".";
  }
  return "How good it is was not measured: baseq eval with --reference and --json tells.";
}

struct Worst {
  std::string name;
  int64_t block = 0;
  double error = 0, median = 0;  ///< median of all linears
};

std::optional<Worst> worst_linear(const RunRecord& run) {
  std::optional<Worst> worst;
  std::vector<double> errors;
  for (const auto& [index, block] : run.blocks) {
    for (const LinearRounded& linear : block.linears) {
      if (!std::isfinite(linear.relative_error)) continue;
      errors.push_back(linear.relative_error);
      if (!worst || linear.relative_error > worst->error) worst = Worst{linear.name, index, linear.relative_error};
    }
  }
  if (!worst) return std::nullopt;
  const auto middle = errors.begin() + static_cast<std::ptrdiff_t>(errors.size() / 2);
  std::nth_element(errors.begin(), middle, errors.end());
  worst->median = *middle;
  return worst;
}

/// The block behind which the error of the residual stream has grown most.
std::string where_the_error_grows(const RunRecord& run) {
  double before = 0, largest = 0;
  std::string text;
  for (const auto& [index, block] : run.blocks) {
    const double error = block.finished ? block.finished->relative_error : std::nan("");
    if (!std::isfinite(error)) return "";
    if (error - before > largest) {
      largest = error - before;
      text = fmt::format("The error of the residual stream grows most in block {}, from {:.4f} to {:.4f}", index,
                         before, error);
    }
    before = error;
  }
  return text;
}

std::string where_bad(const RunRecord& run, const std::optional<Worst>& worst) {
  const std::string grows = where_the_error_grows(run);
  if (!worst) return grows.empty() ? "Where it is bad is not known: there is no log of its run." : grows + ".";
  const std::string linear =
      fmt::format("{} of block {} has the largest error of the linears, {:.3g} beside a median of {:.3g}", worst->name,
                  worst->block, worst->error, worst->median);
  return (grows.empty() ? linear : grows + "; " + linear) + ".";
}

std::string what_would_help(const Report& report, const std::optional<Worst>& worst) {
  const auto& started = report.run.started;
  if (!worst || !started) return "What would help is not known either.";
  if (started->num_samples == 0) {
    return "Calibration would help: its weights were rounded without looking at a text, by a recipe that needs none.";
  }
  if (worst->error > kOutlier * worst->median) {
    return fmt::format("More bits for that one linear would help most (grids.overrides, \"model.layers.{}.{}\").",
                       worst->block, worst->name);
  }
  if (report.summary.weights.find("per channel") != std::string::npos) {
    return "Scales of groups would help: its weights have one scale a channel (grids.weights.strategy, group_size).";
  }
  if (started->num_samples * started->seq_len < kFewTokens) {
    return fmt::format("More calibration data would help: it saw {} tokens (calibration.num_samples).",
                       started->num_samples * started->seq_len);
  }
  return "The errors are even and the data suffices: more bits, or a recipe that learns, would help.";
}

}  // namespace

std::array<std::string, 3> verdict(const Report& report) {
  const std::optional<Worst> worst = worst_linear(report.run);
  return {how_good(report), where_bad(report.run, worst), what_would_help(report, worst)};
}

}  // namespace baseq

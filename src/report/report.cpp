#include "report/report.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "baseq/model/site.h"
#include "html.h"
#include "io/hub_cache.h"
#include "io/units.h"
#include "report/verdict.h"
#include "report/whole_model.h"
#include "report_style.h"
#include "svg_chart.h"

namespace baseq {
namespace {

using nlohmann::json;

constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
constexpr const char* kNothing = "\u2013";

/// `value` by a format such as "{:.3f}"; a dash when it is unknown.
std::string show(double value, const char* format, double factor = 1) {
  return std::isfinite(value) ? fmt::format(fmt::runtime(format), value * factor) : kNothing;
}

/// 0.01234 as it is, 1.2e-5 in powers of ten.
std::string show_error(double value) {
  return show(value, std::abs(value) < 1e-3 || std::abs(value) >= 1e4 ? "{:.3e}" : "{:.4f}");
}

std::string show_bytes(double bytes) {
  return std::isfinite(bytes) ? format_bytes(static_cast<int64_t>(bytes)) : kNothing;
}

std::string show_seconds(double seconds) { return seconds < 1e9 ? format_seconds(seconds) : kNothing; }

double number_at(const json& object, const char* key) {
  const auto it = object.find(key);
  return it != object.end() && it->is_number() ? it->get<double>() : kUnknown;
}

/// A string as it is, anything else as JSON.
std::string text_at(const json& object, const char* key) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return kNothing;
  return it->is_string() ? it->get<std::string>() : it->dump(-1, ' ', false, json::error_handler_t::replace);
}

std::string section(const char* title, const char* about) {
  return fmt::format("<h2>{}</h2>\n<p>{}</p>\n", title, about);
}

std::string figure(const std::string& svg) { return "<div class=\"chart\">\n" + svg + "</div>\n"; }

std::string details(const char* summary, const std::string& html) {
  return fmt::format("<details><summary>{}</summary>\n{}</details>\n", summary, html);
}

std::string card(const std::string& value, const char* what) {
  return fmt::format("<div class=\"card\"><b>{}</b><span>{}</span></div>\n", escape_html(value), what);
}

/// "self_attn.o_proj.input_quant" -> "o_proj input".
std::string short_name(std::string name) {
  for (const SiteInfo& info : sites()) {
    if (!info.point.empty() && info.point == name) return std::string(info.label);
  }
  return name.substr(name.find('.') + 1);  // of a linear: without its module
}

std::vector<std::string> block_names(const RunRecord& run) {
  std::vector<std::string> names;
  for (const auto& [index, block] : run.blocks) names.push_back(std::to_string(index));
  return names;
}

/// Names in the order in which the blocks first have them; `member` is a vector of things with a field `name`.
template <class Member, class NameOf>
std::vector<std::string> names_in(const RunRecord& run, Member member, NameOf name_of) {
  std::vector<std::string> names;
  std::set<std::string> seen;
  for (const auto& [index, block] : run.blocks) {
    for (const auto& item : block.*member) {
      if (seen.insert(name_of(item)).second) names.push_back(name_of(item));
    }
  }
  return names;
}

/// value_of(item) of the item with this name in each block, NaN where there is none.
template <class Member, class NameOf, class ValueOf>
std::vector<double> values_of(const RunRecord& run, Member member, NameOf name_of, const std::string& name,
                              ValueOf value_of) {
  std::vector<double> values;
  for (const auto& [index, block] : run.blocks) {
    double value = kUnknown;
    for (const auto& item : block.*member) {
      if (name_of(item) == name) value = value_of(item);
    }
    values.push_back(value);
  }
  return values;
}

constexpr auto kNameOf = [](const auto& item) { return item.name; };
constexpr auto kStageOf = [](const auto& item) { return item.stage; };

std::string verdict_section(const Report& report) {
  std::string html = "<p>";
  for (const std::string& sentence : verdict(report)) html += escape_html(sentence) + "\n";
  return html + "</p>\n";
}

std::string model_section(const Report& report) {
  const CheckpointSummary& summary = report.summary;
  const RunRecord& run = report.run;
  std::string cards;
  for (const json& result : report.results) {
    const double perplexity = number_at(result, "perplexity");
    if (std::isfinite(perplexity) && model_name(text_at(result, "model")) == summary.name) {
      cards += card(show(perplexity, "{:.3f}"), "perplexity");
      break;
    }
  }
  cards += card(show(summary.bits_per_weight, "{:.2f}"), "bits a weight, scales included");
  cards += card(show_bytes(static_cast<double>(summary.num_bytes)), "weight files");
  if (run.seconds() > 0) cards += card(show_seconds(run.seconds()), "time to quantize");
  if (run.peak_memory_bytes() > 0)
    cards += card(show_bytes(static_cast<double>(run.peak_memory_bytes())), "peak memory");
  HtmlTable table({"", ""}, 2);
  const json& config = report.config;
  std::string architecture = text_at(config, "architectures");
  if (config.contains("architectures") && config["architectures"].is_array() && !config["architectures"].empty() &&
      config["architectures"][0].is_string()) {
    architecture = config["architectures"][0].get<std::string>();
  }
  if (run.started) table.row({"Quantized from", run.started->model});
  table.row({"Architecture", architecture});
  table.row({"Sizes", fmt::format("{} blocks, hidden {}, {} heads, {} key/value heads, ffn {}, vocabulary {}",
                                  text_at(config, "num_hidden_layers"), text_at(config, "hidden_size"),
                                  text_at(config, "num_attention_heads"), text_at(config, "num_key_value_heads"),
                                  text_at(config, "intermediate_size"), text_at(config, "vocab_size"))});
  table.row({"Quantization format", summary.format});
  table.row({"Recipe", summary.recipe.empty() ? kNothing : summary.recipe});
  table.row({"Weights", summary.weights});
  table.row({"Activations", summary.input_activations});
  table.row({"KV cache", summary.kv_cache});
  if (run.started) {
    table.row({"Calibration", run.started->num_samples > 0 ? fmt::format("{} windows of {} tokens",
                                                                         run.started->num_samples, run.started->seq_len)
                                                           : "none"});
    table.row({"Run", fmt::format("seed {}, {}, {} threads", run.started->seed, run.started->device,
                                  run.started->num_threads)});
  }
  return "<div class=\"cards\">\n" + cards + "</div>\n" + table.html();
}

std::string results_section(const Report& report) {
  if (report.results.empty()) return "";
  HtmlTable table({"Model", "Perplexity", "Mean KL (nats)", "Top-1 agreement", "Windows", "Tokens each", "Time"});
  for (const json& result : report.results) {
    table.row({text_at(result, "model"), show(number_at(result, "perplexity"), "{:.4f}"),
               show(number_at(result, "mean_kl"), "{:.5f}"), show(number_at(result, "top1_agreement"), "{:.2f} %", 100),
               text_at(result, "num_windows"), text_at(result, "seq_len"), show_seconds(number_at(result, "seconds"))});
  }
  return section("Evaluation",
                 "KL divergence and agreement of the best guess are to the full-precision model, where it "
                 "was given.") +
         table.html();
}

std::string blocks_section(const RunRecord& run) {
  if (run.blocks.empty()) return "";
  const auto names = block_names(run);
  const auto stages = names_in(run, &BlockRecord::stages, kStageOf);
  std::vector<double> errors;
  for (const auto& [index, block] : run.blocks) {
    errors.push_back(block.finished ? block.finished->relative_error : kUnknown);
  }
  std::string html = section("Blocks",
                             "Relative error: median over the calibration tokens of |quantized &#8722; full|&#178; / "
                             "|full|&#178; of the residual stream behind the block. Losses of the learned stages are "
                             "those of the block's output, over the monitored windows.");
  if (std::any_of(errors.begin(), errors.end(), [](double error) { return std::isfinite(error); })) {
    html += figure(to_svg(LineChart{.title = "Relative error behind each block",
                                    .x_label = "block",
                                    .y_label = "",
                                    .x = names,
                                    .series = {{"relative error", errors}}}));
  }
  std::string charts;
  for (const std::string& stage : stages) {
    charts +=
        figure(to_svg(LineChart{.title = "Loss of " + stage,
                                .x_label = "block",
                                .y_label = "",
                                .x = names,
                                .series = {{"before", values_of(run, &BlockRecord::stages, kStageOf, stage,
                                                                [](const StageLearned& s) { return s.loss_before; })},
                                           {"after", values_of(run, &BlockRecord::stages, kStageOf, stage,
                                                               [](const StageLearned& s) { return s.loss_after; })}},
                                .width = 420,
                                .height = 220}));
  }
  if (!charts.empty()) html += "<div class=\"charts\">\n" + charts + "</div>\n";
  std::vector<std::string> header{"Block", "Relative error"};
  for (const std::string& stage : stages) {
    header.insert(header.end(), {stage + ": before", "after", "change"});
  }
  header.insert(header.end(), {"Time", "Peak memory"});
  HtmlTable table(header);
  for (const auto& [index, block] : run.blocks) {
    std::vector<std::string> cells{std::to_string(index),
                                   show_error(block.finished ? block.finished->relative_error : kUnknown)};
    for (const std::string& stage : stages) {
      double before = kUnknown, after = kUnknown;
      for (const StageLearned& learned : block.stages) {
        if (learned.stage == stage) before = learned.loss_before, after = learned.loss_after;
      }
      cells.insert(cells.end(), {show_error(before), show_error(after), show((after / before - 1) * 100, "{:+.1f} %")});
    }
    const double memory = block.finished ? static_cast<double>(block.finished->peak_memory_bytes) : 0;
    cells.push_back(show_seconds(block.finished ? block.finished->seconds : kUnknown));
    cells.push_back(memory > 0 ? show_bytes(memory) : kNothing);
    table.row(cells);
  }
  return html + details("Every block", table.html());
}

std::string linears_section(const RunRecord& run) {
  const auto linears = names_in(run, &BlockRecord::linears, kNameOf);
  if (linears.empty()) return "";
  HeatMap map{
      .title = "Relative error of each linear", .x_label = "block", .x = block_names(run), .y = {}, .values = {}};
  std::vector<std::string> header{"Block"};
  for (const std::string& name : linears) {
    map.y.push_back(short_name(name));
    header.push_back(short_name(name));
    map.values.push_back(values_of(run, &BlockRecord::linears, kNameOf, name,
                                   [](const LinearRounded& linear) { return linear.relative_error; }));
  }
  HtmlTable table(header);
  for (size_t c = 0; c < map.x.size(); ++c) {
    std::vector<std::string> cells{map.x[c]};
    for (const auto& row : map.values) cells.push_back(show_error(row[c]));
    table.row(cells);
  }
  return section("Linears",
                 "What rounding the weights does to the output of a linear over the calibration inputs, relative "
                 "to that output; to the weight itself where nothing was calibrated.") +
         figure(to_svg(map)) + details("Every linear", table.html());
}

/// Bits a weight of each linear where not all have the same grid.
std::string bits_section(const CheckpointSummary& summary) {
  if (summary.uniform) return "";
  std::map<int64_t, std::map<std::string, double>> blocks;
  std::set<std::string> names;
  for (const auto& [linear, stored] : summary.linears) {
    constexpr std::string_view kBlocks = "model.layers.";
    const size_t end = linear.find('.', kBlocks.size());
    int64_t block = 0;
    const char* digits = linear.c_str() + std::min(kBlocks.size(), linear.size());
    if (end == linear.npos || std::from_chars(digits, linear.c_str() + end, block).ec != std::errc()) continue;
    const std::string name = short_name(linear.substr(end + 1));
    names.insert(name);
    blocks[block][name] = stored.per_weight();
  }
  HeatMap map{.title = "Bits a weight", .x_label = "block", .x = {}, .y = {names.begin(), names.end()}, .values = {}};
  std::vector<std::string> header{"Block"};
  header.insert(header.end(), map.y.begin(), map.y.end());
  HtmlTable table(header);
  map.values.resize(map.y.size());
  for (const auto& [block, linears] : blocks) {
    std::vector<std::string> cells{std::to_string(block)};
    for (size_t row = 0; row < map.y.size(); ++row) {
      const auto found = linears.find(map.y[row]);
      map.values[row].push_back(found == linears.end() ? kUnknown : found->second);
      cells.push_back(show(map.values[row].back(), "{:.3f}"));
    }
    map.x.push_back(cells[0]);
    table.row(cells);
  }
  return section("Bits",
                 "What a weight takes in the checkpoint: its code and its share of scales, zero points, padding and "
                 "corrections of low rank.") +
         figure(to_svg(map)) + details("Every linear", table.html());
}

std::string activations_section(const RunRecord& run) {
  const auto points = names_in(run, &BlockRecord::points, kNameOf);
  if (points.empty()) return "";
  const auto names = block_names(run);
  std::string charts;
  for (const std::string& point : points) {
    charts +=
        figure(to_svg(LineChart{.title = short_name(point),
                                .x_label = "block",
                                .y_label = "",
                                .x = names,
                                .series = {{"before", values_of(run, &BlockRecord::points, kNameOf, point,
                                                                [](const PointMeasured& p) { return p.before.peak; })},
                                           {"after", values_of(run, &BlockRecord::points, kNameOf, point,
                                                               [](const PointMeasured& p) { return p.after.peak; })}},
                                .width = 420,
                                .height = 200}));
  }
  HtmlTable table({"Block", "Quant point", "min before", "max before", "peak before", "difficulty before", "min after",
                   "max after", "peak after", "difficulty after"},
                  2);
  for (const auto& [index, block] : run.blocks) {
    for (const PointMeasured& p : block.points) {
      table.row({std::to_string(index), short_name(p.name), show(p.before.min, "{:.4g}"), show(p.before.max, "{:.4g}"),
                 show(p.before.peak, "{:.2f}"), show(p.before.difficulty, "{:.4g}"), show(p.after.min, "{:.4g}"),
                 show(p.after.max, "{:.4g}"), show(p.after.peak, "{:.2f}"), show(p.after.difficulty, "{:.4g}")});
    }
  }
  return section("Activation ranges",
                 "Peak of a row (a token; a token and head for the caches): max |x| over its root mean "
                 "square, averaged. A grid spends its steps on the peak. Difficulty: the standard deviation over "
                 "channels of a channel's norm (arXiv 2506.01967). Before: the original model. "
                 "After: what the grid is given, once transforms, gains and shifts have done their "
                 "work.") +
         "<div class=\"charts\">\n" + charts + "</div>\n" + details("Ranges of every point", table.html());
}

std::string clips_section(const RunRecord& run) {
  LineChart chart{.title = "Mean clip ratio", .x_label = "block", .y_label = "", .x = block_names(run), .series = {}};
  HtmlTable table({"Block", "Quant point", "Clip ratios", "Gain", "Largest shift"}, 3);
  const auto mean = [](const PointMeasured& p) {
    double sum = 0;
    for (const double clip : p.clip) sum += clip;
    return p.clip.empty() ? kUnknown : sum / static_cast<double>(p.clip.size());
  };
  for (const std::string& point : names_in(run, &BlockRecord::points, kNameOf)) {
    const auto values = values_of(run, &BlockRecord::points, kNameOf, point, mean);
    if (std::any_of(values.begin(), values.end(), [](double value) { return std::isfinite(value); })) {
      chart.series.push_back({short_name(point), values});
    }
  }
  for (const auto& [index, block] : run.blocks) {
    for (const PointMeasured& p : block.points) {
      if (!p.enabled) continue;
      std::string clips;
      for (const double clip : p.clip) clips += (clips.empty() ? "" : "  ") + show(clip, "{:.3f}");
      table.row({std::to_string(index), short_name(p.name), clips.empty() ? kNothing : clips,
                 p.min_gain && p.max_gain ? show(*p.min_gain, "{:.3f} to ") + show(*p.max_gain, "{:.3f}") : kNothing,
                 p.max_shift ? show(*p.max_shift, "{:.3f}") : kNothing});
    }
  }
  if (table.empty()) return "";
  return section("Clips, gains and shifts",
                 "The share of a row's range that the grid covers, one ratio a scale, and what is done to the channels "
                 "first.") +
         (chart.series.empty() ? "" : figure(to_svg(chart))) + details("Every point", table.html());
}

std::string recipe_section(const json& config) {
  const auto quantization = config.find("quantization_config");
  if (quantization == config.end() || !quantization->is_object() || !quantization->contains("recipe")) return "";
  return section("Recipe", "As it was resolved, overrides included.") + "<pre>" +
         escape_html((*quantization)["recipe"].dump(2, ' ', false, json::error_handler_t::replace)) + "</pre>\n";
}

std::string warnings_section(const RunRecord& run) {
  if (run.warnings.empty()) return "";
  std::string html = section("Warnings", "Of the run.");
  for (const std::string& warning : run.warnings) {
    html += "<div class=\"warning\">" + escape_html(warning) + "</div>\n";
  }
  return html;
}

}  // namespace

std::string html_report(const Report& report) {
  const std::string title = escape_html(report.summary.name);
  std::string html = fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"generator\" content=\"baseq\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
      "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
      "<title>{} &#8211; baseq report</title>\n<style>{}</style>\n</head>\n<body>\n<h1>{}</h1>\n",
      title, kReportStyle, title);
  html += verdict_section(report) + model_section(report) + warnings_section(report.run) + results_section(report) +
          blocks_section(report.run) + whole_model_section(report.run) + bits_section(report.summary) +
          linears_section(report.run) + activations_section(report.run) + clips_section(report.run) +
          recipe_section(report.config);
  if (report.run.blocks.empty()) {
    html += fmt::format("<p>The checkpoint has no {}: of its run nothing more is known.</p>\n", kRunLogFile);
  }
  return html + "</body>\n</html>\n";
}

}  // namespace baseq

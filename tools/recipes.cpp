#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>

#include "baseq/export/export_checkpoint.h"
#include "baseq/pipeline/recipe.h"
#include "help.h"
#include "next_step.h"
#include "output_files.h"

namespace baseq::cli {
namespace {

using nlohmann::json;

struct RecipesArguments {
  CommonOptions common;
  std::string name;
};

json bits(const std::optional<QuantSpec>& grid) { return grid ? json(grid->num_bits) : json(nullptr); }

json describe(const BuiltInRecipe& built_in) {
  const Recipe recipe = Recipe::read(std::string(built_in.name));
  const auto& weights = recipe.grids.weights;
  return {{"name", built_in.name},
          {"group", built_in.group},
          {"weights", bits(weights)},
          {"group_size", weights && weights->strategy == Strategy::kGroup ? json(weights->group_size) : json(nullptr)},
          {"input_activations", bits(recipe.grids.input_activations)},
          {"kv_cache", bits(recipe.grids.kv_cache)},
          {"needs_calibration", recipe.needs_calibration()},
          {"method", describe_method(recipe)},
          {"exports", export_formats(recipe)}};
}

constexpr size_t kFields = 7;
using Row = std::array<std::string, kFields>;

Row row_of(const json& recipe) {
  const auto shown = [](const json& value) { return value.is_null() ? "-" : value.dump(); };
  std::string weights = shown(recipe["weights"]);
  if (!recipe["group_size"].is_null()) weights += " g" + recipe["group_size"].dump();
  const auto exports = recipe["exports"].get<std::vector<std::string>>();
  return {recipe["name"].get<std::string>(),
          weights,
          shown(recipe["input_activations"]),
          shown(recipe["kv_cache"]),
          recipe["needs_calibration"] == true ? "yes" : "no",
          exports.empty() ? "-" : fmt::format("{}", fmt::join(exports, ", ")),
          recipe["method"].get<std::string>()};
}

void print_list(const json& recipes) {
  std::vector<Row> rows{{"", "weights", "activations", "cache", "calibration", "export", "method"}};
  for (const json& recipe : recipes) rows.push_back(row_of(recipe));
  std::array<size_t, kFields> widths{};
  for (const Row& row : rows) {
    for (size_t i = 0; i < kFields; ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string group;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i > 0 && recipes[i - 1]["group"] != group) {
      group = recipes[i - 1]["group"].get<std::string>();
      print_text("{}\n", group);
    }
    std::string line = "  ";
    for (size_t column = 0; column + 1 < kFields; ++column) {
      line += fmt::format("{:<{}}  ", rows[i][column], widths[column]);
    }
    print_text("{}\n", line + rows[i].back());
  }
  print_text("{}", R"(
Numbers are bits, - is full precision; g64: scales of groups of 64 inputs. Every result runs in baseq and, of a Llama
model, in transformers (trust_remote_code). export: the formats of baseq export that carry it:
  hf                  dequantized, for any loader
  compressed-tensors  vLLM, transformers
  gptq, awq           GPTQModel, vLLM
  gguf                llama.cpp
  peft                a base model and a LoRA adapter
baseq recipes NAME prints a recipe, to change a copy of it.
)");
}

void run(const RecipesArguments& arguments) {
  if (!arguments.name.empty()) {
    std::fputs(std::string(find_built_in_recipe(arguments.name)->json).c_str(), stdout);
    return;
  }
  check_outputs(arguments.common);
  json recipes = json::array();
  for (const BuiltInRecipe& recipe : built_in_recipes()) recipes.push_back(describe(recipe));
  print_list(recipes);
  write_json(arguments.common, {{"recipes", recipes}});
  say_next(false, "baseq quantize MODEL --recipe NAME");
}

CLI::Validator built_in_recipe() {
  return CLI::Validator(
      [](std::string& name) {
        if (find_built_in_recipe(name) != nullptr) return std::string();
        try {
          read_recipe_json(name);
          return name + " is a file; only built-in recipes are printed";
        } catch (const c10::Error& error) {
          return std::string(error.what_without_backtrace());
        }
      },
      "NAME");
}

}  // namespace

void add_recipes(CLI::App& app) {
  auto arguments = std::make_shared<RecipesArguments>();
  CLI::App* command = app.add_subcommand("recipes", "List the built-in recipes, or print one");
  CLI::Option* name = command->add_option("name", arguments->name, "Print this recipe's JSON instead of the list");
  name->check(built_in_recipe());
  add_common_options(*command, arguments->common, {});
  command->get_option("--json")->excludes(name);
  command->footer("Examples:\n  baseq recipes\n  baseq recipes baseq-w4a4kv4 > mine.json");
  command->callback([arguments] { run(*arguments); });
}

}  // namespace baseq::cli

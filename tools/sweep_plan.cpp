#include "sweep_plan.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <set>
#include <utility>

#include "baseq/formats/open_model.h"
#include "io/apart.h"
#include "io/hub_cache.h"
#include "io/json_object.h"
#include "preflight.h"

namespace baseq::cli {
namespace {

struct Variant {
  std::string recipe, name;
  std::map<std::string, nlohmann::json> overrides;
};

Variant read_variant(const nlohmann::json& value, const std::string& path) {
  Variant variant;
  if (value.is_string()) {
    variant.recipe = value.get<std::string>();
  } else {
    JsonObject object(value, path);
    variant.recipe = object.text("recipe", "");
    variant.name = object.text("name", "");
    if (object.contains("set")) {
      object.object("set");
      variant.overrides = value.at("set").get<std::map<std::string, nlohmann::json>>();
    }
    object.ignore("set");
    object.finish();
  }
  TORCH_CHECK(!variant.recipe.empty(), path, ": recipe: missing; the name of a recipe or a file is required");
  if (variant.name.empty()) variant.name = std::filesystem::path(variant.recipe).stem().string();
  return variant;
}

bool is_file_name(const std::string& name) {
  return !name.empty() && !name.starts_with('.') && name.find('/') == std::string::npos;
}

}  // namespace

std::vector<std::string> SweepJob::settings() const {
  std::vector<std::string> settings;
  for (const auto& [key, value] : overrides) settings.push_back(key + "=" + value.dump());
  return settings;
}

std::vector<std::string> find_problems(const SweepPlan& plan, const std::vector<SweepJob>& jobs) {
  std::vector<std::string> problems;
  const auto attempt = [&](const auto& step) {
    std::string problem;
    try {
      step();
      return;
    } catch (const c10::Error& error) {
      problem = error.what_without_backtrace();
    } catch (const std::exception& error) {
      problem = error.what();
    }
    // Jobs share models and recipes.
    if (std::find(problems.begin(), problems.end(), problem) == problems.end()) problems.push_back(problem);
  };
  std::error_code ignored;
  const std::vector<std::pair<const char*, std::string>> files{
      {"calibration", plan.calibration}, {"text", plan.text}, {"tokens", plan.tokens}};
  for (const auto& [key, file] : files) {
    if (!file.empty() && !std::filesystem::exists(file, ignored)) {
      problems.push_back(std::string(key) + ": " + file + " does not exist");
    }
  }
  std::set<std::string> opened;
  for (const SweepJob& job : jobs) {
    attempt([&] {
      const bool file = std::filesystem::is_regular_file(job.model, ignored);
      const std::filesystem::path model = file ? std::filesystem::path(job.model) : resolve_checkpoint(job.model);
      check_apart(plan.output / job.name, model);
      if (opened.insert(job.model).second) (void)open_model(model);
    });
    if (job.recipe.empty()) continue;
    attempt([&] {
      const Recipe recipe = read_recipe(job.recipe, job.settings());
      TORCH_CHECK(!plan.calibration.empty() || !recipe.needs_calibration(), job.recipe,
                  ": needs calibration data; give the sweep a \"calibration\"");
    });
  }
  return problems;
}

SweepPlan read_sweep_plan(const std::string& file) {
  const nlohmann::json json = read_json_file(file);
  JsonObject object(json, file);
  SweepPlan plan{.output = object.text("output", ""), .calibration = object.text("calibration", "")};
  plan.text = object.text("text", "");
  plan.tokens = object.text("tokens", "");
  plan.seq_len = object.integer("seq_len", plan.seq_len, 2, 1 << 24);
  plan.max_windows = object.integer("max_windows", 0, 0, 1 << 30);
  plan.reference = object.boolean("reference", plan.reference);
  const bool originals = object.boolean("originals", false);
  const std::vector<std::string> models = object.texts("models");
  object.ignore("recipes");
  object.finish();
  TORCH_CHECK(!plan.output.empty(), file, ": output: missing; a directory is required");
  TORCH_CHECK(!models.empty(), file, ": models: missing; an array of checkpoints is required");
  TORCH_CHECK(plan.text.empty() || plan.tokens.empty(), file, ": text and tokens exclude each other");
  TORCH_CHECK(json.contains("recipes") && json["recipes"].is_array(), file,
              ": recipes: expected an array of names or files, or of objects with \"recipe\", \"set\" and \"name\"");
  std::vector<Variant> variants;
  for (size_t i = 0; i < json["recipes"].size(); ++i) {
    variants.push_back(read_variant(json["recipes"][i], file + ": recipes: " + std::to_string(i)));
  }
  std::set<std::string> names;
  const auto add = [&](SweepJob job) {
    TORCH_CHECK(is_file_name(job.name), file, ": \"", job.name, "\" cannot be the name of a directory");
    TORCH_CHECK(names.insert(job.name).second, file, ": two jobs are called \"", job.name,
                "\"; give one of the recipes a \"name\"");
    plan.jobs.push_back(std::move(job));
  };
  for (const std::string& model : models) {
    const std::string name = std::filesystem::path(model_name(model)).filename().string();
    if (originals) add({.name = name, .model = model, .recipe = "", .overrides = {}});
    for (const Variant& variant : variants) {
      add({.name = name + "-" + variant.name,
           .model = model,
           .recipe = variant.recipe,
           .overrides = variant.overrides});
    }
  }
  return plan;
}

}  // namespace baseq::cli

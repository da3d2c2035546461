#include <c10/util/Exception.h>

#include <algorithm>
#include <filesystem>

#include "../io/closest_word.h"
#include "baseq/pipeline/recipe.h"
#include "io/json_object.h"

namespace baseq {
namespace {

namespace fs = std::filesystem;

/// The end of the message about an unknown recipe: the built-in one that was probably meant. Users of a
/// copy of the repository write the path of a file; its name is looked up.
std::string suggestion(const std::string& recipe) {
  std::vector<std::string> names;
  for (const BuiltInRecipe& known : built_in_recipes()) names.emplace_back(known.name);
  const fs::path path(recipe);
  const std::string closest =
      closest_word(path.extension() == ".json" ? path.stem().string() : path.filename().string(), names);
  return closest.empty() ? "" : "; did you mean " + closest + "?";
}

}  // namespace

const BuiltInRecipe* find_built_in_recipe(std::string_view name) {
  const auto recipes = built_in_recipes();
  const auto found = std::ranges::find(recipes, name, &BuiltInRecipe::name);
  return found == recipes.end() ? nullptr : &*found;
}

nlohmann::json read_recipe_json(const std::string& recipe) {
  if (const BuiltInRecipe* built_in = find_built_in_recipe(recipe)) return nlohmann::json::parse(built_in->json);
  std::error_code error;
  TORCH_CHECK(fs::exists(recipe, error), recipe, " is neither a built-in recipe nor a file", suggestion(recipe));
  return read_json_file(recipe);
}

Recipe Recipe::read(const std::string& recipe) { return from_json(read_recipe_json(recipe), recipe); }

}  // namespace baseq

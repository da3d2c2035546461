#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "baseq/pipeline/recipe.h"
#include "io/json_object.h"

namespace baseq {

inline constexpr at::ScalarType kRecipeDtypes[] = {at::kFloat, at::kHalf, at::kBFloat16};
inline constexpr double kMaxLearningRate = 10.0;
inline constexpr int64_t kMaxRecipeInteger = 1 << 24;

inline std::string recipe_dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kChar:
      return "int8";
    default:
      TORCH_CHECK(false, "recipe: no recipe names the dtype ", dtype);
  }
}

inline at::ScalarType read_recipe_dtype(JsonObject& object, const char* key, at::ScalarType fallback,
                                        at::ArrayRef<at::ScalarType> dtypes) {
  std::vector<std::string> names;
  for (const at::ScalarType dtype : dtypes) names.push_back(recipe_dtype_name(dtype));
  const size_t index = std::find(dtypes.begin(), dtypes.end(), fallback) - dtypes.begin();
  return dtypes[object.choice(key, index, names)];
}

/// Reads a recipe's JSON. The fields of a struct are one list, `visit_fields`, for this and for RecipeWriter.
struct RecipeReader {
  JsonObject object;
  const Grids& grids;

  void boolean(const char* key, bool& value) { value = object.boolean(key, value); }
  void integer(const char* key, int64_t& value, int64_t min, int64_t max = kMaxRecipeInteger) {
    value = object.integer(key, value, min, max);
  }
  void number(const char* key, double& value, double min, double max) { value = object.number(key, value, min, max); }
  void text(const char* key, std::string& value) { value = object.text(key, value); }
  template <class Enum>
  void choice(const char* key, Enum& value, const std::vector<std::string>& names) {
    value = static_cast<Enum>(object.choice(key, static_cast<size_t>(value), names));
  }
  void dtype(const char* key, at::ScalarType& value, at::ArrayRef<at::ScalarType> dtypes = kRecipeDtypes) {
    value = read_recipe_dtype(object, key, value, dtypes);
  }
  void sites(const char* key, std::vector<Site>& value) {
    std::vector<std::string> names;
    for (const SiteInfo& info : baseq::sites()) names.emplace_back(info.name);
    value.clear();
    for (const size_t index : object.choices(key, names)) value.push_back(static_cast<Site>(index));
  }
  /// "*" stands for every point that the grids quantize.
  void points(const char* key, std::vector<Site>& value) {
    std::vector<std::string> names;
    std::vector<Site> known, quantized;
    for (const SiteInfo& info : baseq::sites()) {
      if (info.point.empty()) continue;
      names.push_back(point_name(info.site));
      known.push_back(info.site);
      if (info.cache ? grids.kv_cache : grids.input_activations) quantized.push_back(info.site);
    }
    names.emplace_back("*");
    value.clear();
    for (const size_t index : object.choices(key, names)) {
      if (index < known.size()) {
        value.push_back(known[index]);
      } else {
        value.insert(value.end(), quantized.begin(), quantized.end());
      }
    }
  }
  void rates(const char* key, std::map<std::string, double>& value) {
    if (!object.contains(key)) return object.ignore(key);
    JsonObject names = object.object(key);
    for (const std::string& name : names.keys()) {
      if (!names.contains(name)) continue;
      value[name] = names.number(name, 0, 0, kMaxLearningRate);
    }
  }
  /// A list of objects with a list "transforms" each.
  template <class Chains>
  void chains(const char* key, Chains& value) {
    value.clear();
    for (JsonObject& chain : object.objects(key)) {
      value.emplace_back();
      for (JsonObject& transform : chain.objects("transforms")) {
        RecipeReader visit{std::move(transform), grids};
        visit_transform(visit, value.back().emplace_back());
        visit.object.finish();
      }
      chain.finish();
    }
  }
  template <class Section>
  void section(const char* key, std::optional<Section>& value, const Section& defaults = {}) {
    object.ignore(key);
    if (!object.contains(key)) return;
    value = defaults;
    RecipeReader visit{object.object(key), grids};
    visit_fields(visit, *value);
    visit.object.finish();
  }
};

/// Writes what RecipeReader reads.
struct RecipeWriter {
  nlohmann::json object = nlohmann::json::object();

  void boolean(const char* key, const bool& value) { object[key] = value; }
  void integer(const char* key, const int64_t& value, int64_t, int64_t = 0) { object[key] = value; }
  void number(const char* key, const double& value, double, double) {
    TORCH_CHECK(std::isfinite(value), "recipe: ", key, ": ", value, " is no number that JSON has");
    object[key] = value;
  }
  void text(const char* key, const std::string& value) { object[key] = value; }
  template <class Enum>
  void choice(const char* key, const Enum& value, const std::vector<std::string>& names) {
    object[key] = names.at(static_cast<size_t>(value));
  }
  void dtype(const char* key, const at::ScalarType& value, at::ArrayRef<at::ScalarType> = kRecipeDtypes) {
    object[key] = recipe_dtype_name(value);
  }
  void sites(const char* key, const std::vector<Site>& value) {
    object[key] = nlohmann::json::array();
    for (const Site site : value) object[key].push_back(site_info(site).name);
  }
  void points(const char* key, const std::vector<Site>& value) {
    object[key] = nlohmann::json::array();
    for (const Site site : value) object[key].push_back(point_name(site));
  }
  void rates(const char* key, const std::map<std::string, double>& value) {
    RecipeWriter names;
    for (const auto& [name, rate] : value) names.number(name.c_str(), rate, 0, kMaxLearningRate);
    object[key] = names.object;
  }
  template <class Chains>
  void chains(const char* key, const Chains& value) {
    object[key] = nlohmann::json::array();
    for (const auto& chain : value) {
      nlohmann::json transforms = nlohmann::json::array();
      for (const auto& step : chain) {
        RecipeWriter visit;
        visit_transform(visit, step);
        transforms.push_back(visit.object);
      }
      object[key].push_back({{"transforms", transforms}});
    }
  }
  template <class Section>
  void section(const char* key, const std::optional<Section>& value, const Section& = {}) {
    RecipeWriter visit;
    if (value) visit_fields(visit, *value);
    object[key] = value ? visit.object : nlohmann::json(nullptr);
  }
};

/// A struct, to be read or to be written.
template <class T, class Struct>
concept Is = std::same_as<std::remove_const_t<T>, Struct>;

}  // namespace baseq

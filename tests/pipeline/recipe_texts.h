#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "../io/temp_directory.h"
#include "baseq/pipeline/recipe.h"

namespace baseq::test {

inline void expect_refused(const std::string& text, const std::vector<std::string>& parts) {
  SCOPED_TRACE(text);
  expect_error([&] { Recipe::from_json(nlohmann::json::parse(text), "recipe.json"); }, parts);
}

inline Recipe recipe_of(const std::string& text) {
  return Recipe::from_json(nlohmann::json::parse(text), "recipe.json");
}

/// A recipe with every grid and these steps.
inline std::string with_grids(const std::string& steps) {
  return R"({"grids": {"weights": {}, "input_activations": {}, "kv_cache": {}}, "steps": [)" + steps + "]}";
}

/// A recipe of weights alone with these steps.
inline std::string with_weights(const std::string& steps) {
  return R"({"grids": {"weights": {}}, "steps": [)" + steps + "]}";
}

inline const std::string kPoints = R"({"step": "points", "at": ["*"], "shift": "zero"})",
                         kRound = R"({"step": "round"})";

/// A learn step with these rates and kind of weights.
inline std::string learn(const std::string& rates, const char* weights = "rounded") {
  return R"({"step": "learn", "weights": ")" + std::string(weights) + R"(", "rates": {)" + rates + "}}";
}

}  // namespace baseq::test

#pragma once

#include <nlohmann/json.hpp>

namespace baseq::test {

/// One of grids.overrides.
inline nlohmann::json item(const nlohmann::json& linears, const nlohmann::json& weights) {
  return {{"linears", linears}, {"weights", weights}};
}

/// Braces around one item would copy it.
template <class... Items>
nlohmann::json list_of(const Items&... items) {
  nlohmann::json array = nlohmann::json::array();
  (array.push_back(items), ...);
  return array;
}

}  // namespace baseq::test

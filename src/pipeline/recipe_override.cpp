#include <c10/util/Exception.h>

#include <charconv>

#include "baseq/pipeline/recipe.h"

namespace baseq {
namespace {

using nlohmann::json;

/// The item of `list` that `key` counts, from 0.
json& item_of(json& list, const std::string& key, const std::string& path, const std::string& so_far) {
  size_t index = 0;
  const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), index);
  TORCH_CHECK(error == std::errc{} && end == key.data() + key.size(), "recipe override: \"", path, "\": ", so_far,
              " is a list; expected the number of an item, got \"", key, "\"");
  TORCH_CHECK(index < list.size(), "recipe override: \"", path, "\": ", so_far, " has ", list.size(),
              " items, counted from 0; there is no item ", key);
  return list[index];
}

}  // namespace

void override_recipe(json& recipe, const std::string& path, const std::string& text) {
  json* value = &recipe;
  std::string so_far;
  for (size_t begin = 0;;) {
    const bool in_rates = so_far == "rates" || so_far.ends_with(".rates");
    const size_t dot = in_rates ? std::string::npos : path.find('.', begin);
    const std::string key = path.substr(begin, dot - begin);
    TORCH_CHECK(!key.empty(), "recipe override: \"", path, "\" is not a dotted path of keys");
    TORCH_CHECK(value->is_structured() || value->is_null(), "recipe override: \"", path, "\" passes through a value");
    value = value->is_array() ? &item_of(*value, key, path, so_far) : &(*value)[key];
    if (dot == std::string::npos) break;
    so_far = path.substr(0, dot);
    begin = dot + 1;
  }
  const json parsed = json::parse(text, nullptr, /*allow_exceptions=*/false);
  *value = parsed.is_discarded() ? json(text) : parsed;
}

}  // namespace baseq

#include "io/json_object.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <fstream>

#include "closest_word.h"
#include "files.h"
#include "strict_json.h"

namespace baseq {
using nlohmann::json;

JsonObject::JsonObject(const json& value, std::string path) : JsonObject(value, std::move(path), ": ") {}

JsonObject::JsonObject(const json& value, std::string path, const char* separator)
    : value_(value), path_(std::move(path)), separator_(separator) {
  TORCH_CHECK(value.is_object(), path_, ": expected an object, got ", short_json(value));
}

std::string JsonObject::path_of(std::string_view key) const { return fmt::format("{}{}{}", path_, separator_, key); }

const json* JsonObject::find(std::string_view key) {
  asked_.emplace(key);
  const auto it = value_.find(key);
  return it == value_.end() || it->is_null() ? nullptr : &*it;
}

void JsonObject::fail(std::string_view key, const std::string& expected, const json& got) const {
  TORCH_CHECK(false, path_of(key), ": expected ", expected, ", got ", short_json(got));
}

bool JsonObject::contains(std::string_view key) const {
  const auto it = value_.find(key);
  return it != value_.end() && !it->is_null();
}

JsonObject JsonObject::object(std::string_view key) {
  const json* value = find(key);
  TORCH_CHECK(value != nullptr, path_of(key), ": missing; an object is required");
  return {*value, path_of(key), "."};
}

std::vector<JsonObject> JsonObject::objects(std::string_view key) {
  const json* value = find(key);
  if (!value) return {};
  if (!value->is_array()) fail(key, "an array of objects", *value);
  std::vector<JsonObject> objects;
  for (size_t i = 0; i < value->size(); ++i) {
    if (!(*value)[i].is_null()) objects.push_back({(*value)[i], fmt::format("{}[{}]", path_of(key), i), "."});
  }
  return objects;
}

std::vector<std::string> JsonObject::keys() const {
  std::vector<std::string> keys;
  for (const auto& [key, value] : value_.items()) keys.push_back(key);
  return keys;
}

bool JsonObject::boolean(std::string_view key, bool fallback) {
  const json* value = find(key);
  if (!value) return fallback;
  if (!value->is_boolean()) fail(key, "true or false", *value);
  return value->get<bool>();
}

int64_t JsonObject::integer(std::string_view key, int64_t fallback, int64_t min, int64_t max) {
  const json* value = find(key);
  if (!value) return fallback;
  const bool too_large = value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  if (!value->is_number_integer() || too_large || value->get<int64_t>() < min || value->get<int64_t>() > max) {
    fail(key, fmt::format("an integer from {} to {}", min, max), *value);
  }
  return value->get<int64_t>();
}

double JsonObject::number(std::string_view key, double fallback, double min, double max) {
  const json* value = find(key);
  if (!value) return fallback;
  if (!value->is_number() || !(value->get<double>() >= min && value->get<double>() <= max)) {
    fail(key, fmt::format("a number from {} to {}", min, max), *value);
  }
  return value->get<double>();
}

std::string JsonObject::text(std::string_view key, std::string fallback) {
  const json* value = find(key);
  if (!value) return fallback;
  if (!value->is_string()) fail(key, "a string", *value);
  return value->get<std::string>();
}

size_t JsonObject::choice(std::string_view key, size_t fallback, const std::vector<std::string>& choices) {
  const json* value = find(key);
  if (!value) return fallback;
  const auto it =
      value->is_string() ? std::find(choices.begin(), choices.end(), value->get<std::string>()) : choices.end();
  if (it == choices.end()) fail(key, fmt::format("one of \"{}\"", fmt::join(choices, "\", \"")), *value);
  return static_cast<size_t>(it - choices.begin());
}

std::vector<size_t> JsonObject::choices(std::string_view key, const std::vector<std::string>& choices) {
  const std::string expected = fmt::format("an array with any of \"{}\"", fmt::join(choices, "\", \""));
  const json* value = find(key);
  TORCH_CHECK(value != nullptr, path_of(key), ": missing; expected ", expected);
  if (!value->is_array()) fail(key, expected, *value);
  std::vector<size_t> indices;
  for (const json& item : *value) {
    const auto it =
        item.is_string() ? std::find(choices.begin(), choices.end(), item.get<std::string>()) : choices.end();
    if (it == choices.end()) fail(key, expected, item);
    indices.push_back(static_cast<size_t>(it - choices.begin()));
  }
  return indices;
}

std::vector<std::string> JsonObject::texts(std::string_view key) {
  const json* value = find(key);
  if (!value) return {};
  const bool strings =
      value->is_array() && std::all_of(value->begin(), value->end(), [](const json& item) { return item.is_string(); });
  if (!strings) fail(key, "an array of strings", *value);
  return value->get<std::vector<std::string>>();
}

std::vector<double> JsonObject::numbers(std::string_view key, double min, double max) {
  const json* value = find(key);
  if (!value) return {};
  const auto fits = [&](const json& item) {
    return item.is_number() && item.get<double>() >= min && item.get<double>() <= max;
  };
  if (!value->is_array() || !std::all_of(value->begin(), value->end(), fits)) {
    fail(key, fmt::format("an array of numbers from {} to {}", min, max), *value);
  }
  return value->get<std::vector<double>>();
}

void JsonObject::ignore(std::string_view key) { asked_.emplace(key); }

void JsonObject::finish() const {
  constexpr size_t kMaxNamed = 10;
  std::vector<std::string> unknown;
  size_t count = 0;
  for (const auto& [key, value] : value_.items()) {
    if (!asked_.contains(key) && ++count <= kMaxNamed) unknown.push_back(shortened(key, 200));
  }
  if (count == 0) return;
  const std::string closest = closest_word(unknown.front(), {asked_.begin(), asked_.end()});
  TORCH_CHECK(false, path_, ": unknown key \"", fmt::format("{}", fmt::join(unknown, "\", \"")), "\"",
              count > kMaxNamed ? fmt::format(" and {} more", count - kMaxNamed) : "", "; known are \"",
              fmt::format("{}", fmt::join(asked_, "\", \"")), "\"",
              closest.empty() ? "" : fmt::format("; did you mean \"{}\"?", closest));
}

json read_json_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file.good(), path, ": cannot be opened");
  // Not read_file: a recipe may come through a pipe.
  std::string text;
  std::array<char, size_t{1} << 16> part;
  while (file.read(part.data(), part.size()), file.gcount() > 0) {
    text.append(part.data(), static_cast<size_t>(file.gcount()));
    TORCH_CHECK(text.size() <= kMaxJsonBytes, path, ": has more than ", kMaxJsonBytes,
                " bytes, the most that is read of a JSON file");
  }
  return parse_json(text, path, DuplicateKeys::kLastWins);
}

void write_json_file(const std::filesystem::path& path, const json& value) {
  FileWriter file("JSON", path);
  file.write(dump_json(value, path.string(), /*indent=*/2) + "\n");
  file.commit();
}

}  // namespace baseq

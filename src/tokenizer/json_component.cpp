#include "json_component.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "../io/strict_json.h"
#include "unicode.h"

namespace baseq {

using nlohmann::json;

namespace {

constexpr size_t kMaxShown = 60;                        // of a value in a message
constexpr size_t kMaxListed = 20, kMaxItemBytes = 500;  // of what is not supported

}  // namespace

JsonComponent::JsonComponent(const json& value, std::string place) : value_(&value), place_(std::move(place)) {
  TORCH_CHECK(value.is_object(), place_.empty() ? "the file" : place_, " is ", value.type_name(),
              ", expected an object");
}

const json& JsonComponent::at(const std::string& key) const {
  const auto found = value_->find(key);
  TORCH_CHECK(found != value_->end(), place_of(key), " is missing");
  return *found;
}

const json& JsonComponent::get(const std::string& key) const {
  static const json null;
  const auto found = value_->find(key);
  return found == value_->end() ? null : *found;
}

const json& JsonComponent::array(const std::string& key) const {
  const json& value = at(key);
  TORCH_CHECK(value.is_array(), place_of(key), " is ", value.type_name(), ", expected an array");
  return value;
}

std::string JsonComponent::string(const std::string& key) const {
  const json& value = at(key);
  TORCH_CHECK(value.is_string(), place_of(key), " is ", value.type_name(), ", expected a string");
  return value.get<std::string>();
}

bool JsonComponent::boolean(const std::string& key) const {
  const json& value = at(key);
  TORCH_CHECK(value.is_boolean(), place_of(key), " is ", value.type_name(), ", expected a boolean");
  return value.get<bool>();
}

char32_t JsonComponent::character(const std::string& key) const {
  const std::string text = string(key);
  TORCH_CHECK(!text.empty() && code_point_at(text, 0).num_bytes == text.size(), place_of(key), " is '", text,
              "', expected one character");
  return code_point_at(text, 0).value;
}

int64_t JsonComponent::count(const std::string& key) const {
  const json& value = at(key);
  TORCH_CHECK(value.is_number_unsigned() && value.get<uint64_t>() <= std::numeric_limits<int32_t>::max(), place_of(key),
              " is ", short_json(value, kMaxShown), ", expected an integer from 0");
  return value.get<int64_t>();
}

size_t JsonComponent::choice(const std::string& key, const std::vector<std::string>& choices) const {
  const std::string text = string(key);
  const auto found = std::ranges::find(choices, text);
  std::string list;
  for (const std::string& known : choices) list += (list.empty() ? "" : ", ") + known;
  TORCH_CHECK(found != choices.end(), place_of(key), " is '", text, "', expected one of ", list);
  return static_cast<size_t>(found - choices.begin());
}

int32_t read_token_id(const json& value, const std::string& place) {
  constexpr auto kMax = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(value.is_number_unsigned() && value.get<uint64_t>() <= kMax, place, " is ", short_json(value, kMaxShown),
              ", expected a token id from 0 to ", kMax);
  return value.get<int32_t>();
}

void Unsupported::add(const std::string& what) {
  if (++count_ <= kMaxListed) items_.push_back(shortened(what, kMaxItemBytes));
}

void Unsupported::unless(bool supported, const JsonComponent& object, const std::string& key) {
  if (!supported) add(object.place_of(key) + " = " + short_json(object.get(key), kMaxShown));
}

void Unsupported::other_keys(const JsonComponent& object, const std::set<std::string, std::less<>>& known) {
  for (const auto& [key, value] : object.value().items()) {
    if (!known.contains(key)) unless(false, object, key);
  }
}

void Unsupported::check() const {
  if (items_.empty()) return;
  std::string list;
  for (const std::string& item : items_) list += (list.empty() ? "" : ", ") + item;
  if (count_ > kMaxListed) list += " and " + std::to_string(count_ - kMaxListed) + " more";
  TORCH_CHECK(false, "it needs what is not supported: ", list);
}

}  // namespace baseq

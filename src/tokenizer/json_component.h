#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

namespace baseq {

/// One JSON object of a tokenizer.json and its place in the file, for messages: "model", "normalizer.normalizers[0]".
/// What is missing or mistyped is a c10::Error that names its place.
class JsonComponent {
 public:
  using json = nlohmann::json;

  /// @param value must outlive this view
  JsonComponent(const json& value, std::string place);

  std::string place_of(const std::string& key) const { return place_.empty() ? key : place_ + "." + key; }
  const json& at(const std::string& key) const;
  const json& get(const std::string& key) const;  ///< an absent key reads as null
  JsonComponent object(const std::string& key) const { return {at(key), place_of(key)}; }
  const json& array(const std::string& key) const;
  std::string string(const std::string& key) const;
  bool boolean(const std::string& key) const;
  char32_t character(const std::string& key) const;  ///< a string of one code point
  int64_t count(const std::string& key) const;       ///< an integer from 0
  /// Calls `fn(JsonComponent)` with each object of an array.
  template <class Fn>
  void for_each_object(const std::string& key, Fn&& fn) const;
  /// The index in `choices` of a string; throws for another.
  size_t choice(const std::string& key, const std::vector<std::string>& choices) const;
  const json& value() const { return *value_; }
  const std::string& place() const { return place_; }

 private:
  const json* value_;
  std::string place_;
};

template <class Fn>
void JsonComponent::for_each_object(const std::string& key, Fn&& fn) const {
  const json& values = array(key);
  for (size_t i = 0; i < values.size(); ++i) {
    fn(JsonComponent(values[i], place_of(key) + "[" + std::to_string(i) + "]"));
  }
}

/// `value`, throwing with `place` when it is no token id.
int32_t read_token_id(const nlohmann::json& value, const std::string& place);

/// Collects what this library cannot do exactly, so that one message can name all of it.
class Unsupported {
 public:
  void add(const std::string& what);
  void unless(bool supported, const JsonComponent& object, const std::string& key);
  void other_keys(const JsonComponent& object, const std::set<std::string, std::less<>>& known);
  void check() const;  ///< throws when there is anything

 private:
  std::vector<std::string> items_;  // the first of them
  size_t count_ = 0;
};

}  // namespace baseq

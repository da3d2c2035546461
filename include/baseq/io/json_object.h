#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace baseq {

/// A strict view of one JSON object: a missing or mistyped value, and in finish() a key that nobody asked for, is a
/// c10::Error that names its path, such as "recipe.json: weights: num_bits: expected an integer from 2 to 8, got
/// \"four\"".
class JsonObject {
 public:
  /// @param value must outlive this view
  /// @param path  how error messages name it: a file, then the keys below it
  JsonObject(const nlohmann::json& value, std::string path);

  bool contains(std::string_view key) const;  ///< present and not null
  JsonObject object(std::string_view key);    ///< throws when missing

  bool boolean(std::string_view key, bool fallback);
  int64_t integer(std::string_view key, int64_t fallback, int64_t min, int64_t max);
  double number(std::string_view key, double fallback, double min, double max);
  std::string text(std::string_view key, std::string fallback);
  /// The index in `choices` of a string value.
  size_t choice(std::string_view key, size_t fallback, const std::vector<std::string>& choices);
  std::vector<std::string> texts(std::string_view key);  ///< empty when missing
  /// Numbers from min to max each; empty when missing.
  std::vector<double> numbers(std::string_view key, double min, double max);
  void ignore(std::string_view key);  ///< accepts the key whatever it holds

  /// Throws naming every key that was never asked for.
  void finish() const;
  const std::string& path() const { return path_; }

 private:
  const nlohmann::json* find(std::string_view key);
  [[noreturn]] void fail(std::string_view key, const std::string& expected, const nlohmann::json& got) const;
  const nlohmann::json& value_;
  std::string path_;
  std::set<std::string, std::less<>> asked_;
};

/// Reads and parses a file; throws c10::Error with the file and the position of a syntax error.
nlohmann::json read_json_file(const std::string& path);

/// Writes `value`, indented, beside `path`, syncs it and renames it; throws c10::Error naming the file.
void write_json_file(const std::filesystem::path& path, const nlohmann::json& value);

}  // namespace baseq

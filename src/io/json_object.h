#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace baseq {

/// A strict view of one JSON object: a missing or mistyped value, and in finish() a key that nobody asked for, is a
/// c10::Error that names its path, such as "recipe.json: grids.weights.num_bits: expected an integer from 2 to 8, got
/// \"four\"".
class JsonObject {
 public:
  /// @param value must outlive this view
  /// @param path  how error messages name it; for what is inside, the keys follow: "file: steps[3].rates"
  JsonObject(const nlohmann::json& value, std::string path);

  bool contains(std::string_view key) const;  ///< present and not null
  JsonObject object(std::string_view key);    ///< throws when missing
  /// Those of an array; null in it counts as absent, and so does the array.
  std::vector<JsonObject> objects(std::string_view key);
  std::vector<std::string> keys() const;  ///< in alphabetical order, whatever they hold

  bool boolean(std::string_view key, bool fallback);
  int64_t integer(std::string_view key, int64_t fallback, int64_t min, int64_t max);
  double number(std::string_view key, double fallback, double min, double max);
  std::string text(std::string_view key, std::string fallback);
  /// The index in `choices` of a string value.
  size_t choice(std::string_view key, size_t fallback, const std::vector<std::string>& choices);
  /// The indices in `choices` of an array of strings; throws when missing.
  std::vector<size_t> choices(std::string_view key, const std::vector<std::string>& choices);
  std::vector<std::string> texts(std::string_view key);  ///< empty when missing
  /// Numbers from min to max each; empty when missing.
  std::vector<double> numbers(std::string_view key, double min, double max);
  void ignore(std::string_view key);  ///< accepts the key whatever it holds

  /// Throws naming every key that was never asked for.
  void finish() const;
  const std::string& path() const { return path_; }

 private:
  JsonObject(const nlohmann::json& value, std::string path, const char* separator);
  std::string path_of(std::string_view key) const;
  const nlohmann::json* find(std::string_view key);
  [[noreturn]] void fail(std::string_view key, const std::string& expected, const nlohmann::json& got) const;
  const nlohmann::json& value_;
  std::string path_;
  const char* separator_ = ": ";  ///< between `path_` and a key
  std::set<std::string, std::less<>> asked_;
};

/// Reads and parses a file; throws c10::Error with the file and the position of a syntax error.
nlohmann::json read_json_file(const std::string& path);

/// Writes `value`, indented, beside `path`, syncs it and renames it; throws c10::Error naming the file.
void write_json_file(const std::filesystem::path& path, const nlohmann::json& value);

}  // namespace baseq

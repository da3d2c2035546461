#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace baseq {

/// What a key that stands twice in one object means.
enum class DuplicateKeys {
  kRefuse,    ///< an error: two readers could see two different files
  kLastWins,  ///< as in Python's json module
};

/// Twice the largest tokenizer.json that is known, that of Gemma 3.
inline constexpr size_t kMaxJsonBytes = size_t{64} << 20;

/// Counts what JSON values take in memory while they are read, so that a file cannot ask for many times its size: two
/// bytes of text may become an object of more than a hundred. The counts are what nlohmann's values and glibc's
/// allocator take, rounded up.
class JsonBudget {
 public:
  /// Gemma 3's tokenizer.json, 262144 tokens and 514906 merges, counts 205 MiB.
  static constexpr size_t kMaxBytes = size_t{224} << 20;

  explicit JsonBudget(const std::string& where) : where_(where) {}
  void add(size_t num_bytes);  ///< throws a sentence that begins with `where` when it is too much
  /// Twice their 16 bytes: a growing array has room for as many again.
  void add_values(size_t count) { add(count <= kMaxBytes ? 32 * count : kMaxBytes); }
  void add_container() { add(128); }  ///< 48 while an array grows, 64 for itself
  void add_text(size_t size) { add(48 + out_of_line(size)); }
  void add_member(size_t key_size) { add(80 + out_of_line(key_size)); }

 private:
  /// A string of up to 15 bytes needs no memory of its own; the parser's longer ones have room for twice their size.
  static size_t out_of_line(size_t size) { return size > 15 ? 2 * size : 0; }
  const std::string& where_;
  size_t used_ = 0;
};

/// Parses JSON from a file nobody vouches for. Throws one sentence that begins with `where` ("the header of x") and
/// gives the position: syntax errors, invalid UTF-8, NUL bytes, nesting deeper than 64, and duplicate keys if refused;
/// also where the values take more memory than JsonBudget allows.
nlohmann::json parse_json(std::string_view text, const std::string& where, DuplicateKeys duplicates);

/// The same of a regular file of at most kMaxJsonBytes; messages begin with "`who`: `path`".
nlohmann::json read_json(std::string_view who, const std::filesystem::path& path, DuplicateKeys duplicates);

/// JSON text of `value`, indented by `indent` spaces (-1: on one line). Throws when a string is not valid UTF-8.
std::string dump_json(const nlohmann::json& value, const std::string& where, int indent = -1);

/// JSON text of `value` for an error message, shortened when it is longer than `max_size` bytes, however large it is.
std::string short_json(const nlohmann::json& value, size_t max_size = 200);

/// The first `max_size` bytes of UTF-8 and dots, or all of it.
std::string shortened(std::string_view text, size_t max_size);

/// `text` in double quotes for an error message: ASCII, control characters escaped, shortened when it is very long.
std::string quote(std::string_view text);

}  // namespace baseq

#include "strict_json.h"

#include <ATen/ATen.h>

#include <utility>
#include <vector>

namespace baseq {
namespace {

constexpr size_t kMaxDepth = 64;
constexpr size_t kMaxQuoted = 200;

// "[json.exception.parse_error.101] parse error at line 1, ..." without the library's own code in front, and without
// the raw bytes of the input that the message may repeat.
std::string reason_of(const nlohmann::json::exception& error) {
  std::string reason = error.what();
  if (const size_t end = reason.find("] "); reason.starts_with('[') && end != reason.npos) {
    reason.erase(0, end + 2);
  }
  for (char& c : reason) {
    if (c < 0x20 || c > 0x7e) {
      c = '?';
    }
  }
  if (reason.size() > 2 * kMaxQuoted) {  // the message repeats the last token, however long it is
    reason = reason.substr(0, kMaxQuoted) + "..." + reason.substr(reason.size() - kMaxQuoted);
  }
  return reason;
}

// Builds the value from the parser's events. (The parser's own callback cannot do the checks: in nlohmann 3.11 it walks
// all members of an object after each of them, which takes 19 s for the header of a file with 20000 tensors.)
class StrictBuilder : public nlohmann::json_sax<nlohmann::json> {
 public:
  StrictBuilder(const std::string& where, DuplicateKeys duplicates) : where_(where), duplicates_(duplicates) {}
  nlohmann::json take() { return std::move(root_); }

  bool null() override { return put(nullptr); }
  bool boolean(bool value) override { return put(value); }
  bool number_integer(number_integer_t value) override { return put(value); }
  bool number_unsigned(number_unsigned_t value) override { return put(value); }
  bool number_float(number_float_t value, const string_t&) override { return put(value); }
  bool string(string_t& value) override { return put(std::move(value)); }
  bool binary(binary_t& value) override { return put(std::move(value)); }
  bool start_object(size_t) override { return open(nlohmann::json::object()); }
  bool start_array(size_t) override { return open(nlohmann::json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& key) override {
    TORCH_CHECK(duplicates_ == DuplicateKeys::kLastWins || !open_.back()->contains(key), where_, " has the key ",
                quote(key), " twice");
    member_ = &(*open_.back())[key];
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::json::exception& error) override {
    TORCH_CHECK(false, where_, " is not valid JSON: ", reason_of(error));
  }

 private:
  // Where the next value goes: the root, the end of the open array or the member of the last key.
  nlohmann::json& place(nlohmann::json value) {
    if (open_.empty()) {
      return root_ = std::move(value);
    }
    if (open_.back()->is_array()) {
      return open_.back()->emplace_back(std::move(value));
    }
    return *member_ = std::move(value);
  }
  bool put(nlohmann::json value) {
    place(std::move(value));
    return true;
  }
  bool open(nlohmann::json value) {
    TORCH_CHECK(open_.size() < kMaxDepth, where_, " nests deeper than ", kMaxDepth, " levels");
    open_.push_back(&place(std::move(value)));  // stays valid: its parent changes only after it is closed
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& where_;
  DuplicateKeys duplicates_;
  nlohmann::json root_;
  std::vector<nlohmann::json*> open_;  // objects and arrays that are not closed yet, outermost first
  nlohmann::json* member_ = nullptr;
};

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& where, DuplicateKeys duplicates) {
  // The parser takes a NUL byte for the end of the text and would ignore what follows.
  const size_t nul = text.find('\0');
  TORCH_CHECK(nul == text.npos, where, " is not valid JSON: NUL byte at position ", nul);
  StrictBuilder builder(where, duplicates);
  nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

std::string dump_json(const nlohmann::json& value, const std::string& where, int indent) {
  try {
    return value.dump(indent);
  } catch (const nlohmann::json::exception& error) {
    TORCH_CHECK(false, where, " cannot be written as JSON: ", reason_of(error));
  }
}

std::string quote(std::string_view text) {
  const bool shortened = text.size() > kMaxQuoted;
  const nlohmann::json value = std::string(text.substr(0, kMaxQuoted)) + (shortened ? "..." : "");
  return value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
}

}  // namespace baseq

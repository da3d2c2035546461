#include "strict_json.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "files.h"

namespace baseq {
namespace {

constexpr size_t kMaxDepth = 64;
constexpr size_t kMaxQuoted = 200;

// The text of `value` up to `max_size` bytes and a little more: a value may be larger than any message.
void append_json(const nlohmann::json& value, size_t max_size, std::string& text) {
  if (text.size() > max_size) return;
  if (value.is_string()) {
    const nlohmann::json start = value.get_ref<const std::string&>().substr(0, max_size + 1);
    text += start.dump(-1, ' ', /*ensure_ascii=*/false, nlohmann::json::error_handler_t::replace);
  } else if (value.is_structured()) {
    text += value.is_array() ? '[' : '{';
    bool first = true;
    for (const auto& [key, member] : value.items()) {
      if (!std::exchange(first, false)) text += ',';
      if (value.is_object()) {
        append_json(key, max_size, text);
        text += ':';
      }
      append_json(member, max_size, text);
      if (text.size() > max_size) return;
    }
    text += value.is_array() ? ']' : '}';
  } else {
    text += value.dump();
  }
}

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
  StrictBuilder(const std::string& where, DuplicateKeys duplicates, size_t text_size)
      : where_(where), duplicates_(duplicates), budget_(where) {
    budget_.add(text_size);
  }
  nlohmann::json take() { return std::move(root_); }

  bool null() override { return put(nullptr); }
  bool boolean(bool value) override { return put(value); }
  bool number_integer(number_integer_t value) override { return put(value); }
  bool number_unsigned(number_unsigned_t value) override { return put(value); }
  bool number_float(number_float_t value, const string_t&) override { return put(value); }
  bool string(string_t& value) override {
    budget_.add_text(value.size());
    return put(std::move(value));
  }
  bool binary(binary_t& value) override { return put(std::move(value)); }
  bool start_object(size_t) override { return open(nlohmann::json::object()); }
  bool start_array(size_t) override { return open(nlohmann::json::array()); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& key) override {
    TORCH_CHECK(duplicates_ == DuplicateKeys::kLastWins || !open_.back()->contains(key), where_, " has the key ",
                quote(key), " twice");
    budget_.add_member(key.size());
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
    budget_.add_values(1);
    place(std::move(value));
    return true;
  }
  bool open(nlohmann::json value) {
    TORCH_CHECK(open_.size() < kMaxDepth, where_, " nests deeper than ", kMaxDepth, " levels");
    budget_.add_container();
    open_.push_back(&place(std::move(value)));  // stays valid: its parent changes only after it is closed
    return true;
  }
  bool close() {
    open_.pop_back();
    return true;
  }

  const std::string& where_;
  DuplicateKeys duplicates_;
  JsonBudget budget_;
  nlohmann::json root_;
  std::vector<nlohmann::json*> open_;  // objects and arrays that are not closed yet, outermost first
  nlohmann::json* member_ = nullptr;
};

}  // namespace

void JsonBudget::add(size_t num_bytes) {
  used_ += std::min(num_bytes, kMaxBytes);
  TORCH_CHECK(used_ <= kMaxBytes, where_, " takes more than ", kMaxBytes >> 20,
              " MiB of memory, its text and the values in it together; that is more than any model needs");
}

nlohmann::json parse_json(std::string_view text, const std::string& where, DuplicateKeys duplicates) {
  refuse_lfs_pointer(text, where);
  // The parser takes a NUL byte for the end of the text and would ignore what follows.
  const size_t nul = text.find('\0');
  TORCH_CHECK(nul == text.npos, where, " is not valid JSON: NUL byte at position ", nul);
  StrictBuilder builder(where, duplicates, text.size());
  nlohmann::json::sax_parse(text.begin(), text.end(), &builder);
  return builder.take();
}

nlohmann::json read_json(std::string_view who, const std::filesystem::path& path, DuplicateKeys duplicates) {
  return parse_json(read_file(who, path, kMaxJsonBytes), std::string(who) + ": " + path.string(), duplicates);
}

std::string short_json(const nlohmann::json& value, size_t max_size) {
  std::string text;
  append_json(value, max_size, text);
  return shortened(text, max_size);
}

std::string shortened(std::string_view text, size_t max_size) {
  if (text.size() <= max_size) return std::string(text);
  // Not in the middle of a character.
  while (max_size > 0 && (static_cast<unsigned char>(text[max_size]) & 0xC0) == 0x80) --max_size;
  return std::string(text.substr(0, max_size)) + "...";
}

std::string dump_json(const nlohmann::json& value, const std::string& where, int indent) {
  try {
    return value.dump(indent);
  } catch (const nlohmann::json::exception& error) {
    TORCH_CHECK(false, where, " cannot be written as JSON: ", reason_of(error));
  }
}

std::string quote(std::string_view text) {
  const nlohmann::json value = shortened(text, kMaxQuoted);
  return value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
}

}  // namespace baseq

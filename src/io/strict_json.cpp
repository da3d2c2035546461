#include "strict_json.h"

#include <ATen/ATen.h>

#include <unordered_set>
#include <vector>

namespace baseq {
namespace {

constexpr int kMaxDepth = 64;
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

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& where, DuplicateKeys duplicates) {
  // The parser takes a NUL byte for the end of the text and would ignore what follows.
  const size_t nul = text.find('\0');
  TORCH_CHECK(nul == text.npos, where, " is not valid JSON: NUL byte at position ", nul);
  std::vector<std::unordered_set<std::string>> open_objects;
  const auto check = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      TORCH_CHECK(depth < kMaxDepth, where, " nests deeper than ", kMaxDepth, " levels");
    }
    if (duplicates == DuplicateKeys::kRefuse) {
      if (event == Event::object_start) {
        open_objects.emplace_back();
      } else if (event == Event::object_end) {
        open_objects.pop_back();
      } else if (event == Event::key) {
        const auto& key = parsed.get_ref<const std::string&>();
        TORCH_CHECK(open_objects.back().insert(key).second, where, " has the key ", quote(key), " twice");
      }
    }
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), check);
  } catch (const nlohmann::json::exception& error) {
    TORCH_CHECK(false, where, " is not valid JSON: ", reason_of(error));
  }
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

#include "decoder.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <string_view>
#include <utility>

#include "unicode.h"

namespace baseq {
namespace {

using Tokens = std::vector<std::string>;

std::string join(const Tokens& tokens) {
  std::string text;
  for (const std::string& token : tokens) text += token;
  return text;
}

// The byte that a token such as <0x0A> stands for.
std::optional<char> fallback_byte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || !token.ends_with('>')) return std::nullopt;
  std::string_view digits = token.substr(3, 2);
  if (digits[0] == '+') digits.remove_prefix(1);  // Rust's numbers may have a sign
  unsigned value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, 16);
  if (error != std::errc() || end != digits.data() + digits.size()) return std::nullopt;
  return static_cast<char>(value);
}

void apply(decoders::ByteLevel, Tokens& tokens, size_t /*original*/) {
  std::string bytes;
  for (const std::string& token : tokens) bytes += token_to_bytes(token);
  tokens = {replace_invalid_utf8(bytes)};
}

// A run of bytes becomes its text or, when it is none, as many U+FFFD.
void apply(decoders::ByteFallback, Tokens& tokens, size_t /*original*/) {
  Tokens result;
  std::string bytes;
  const auto flush = [&] {
    if (bytes.empty()) return;
    if (find_invalid_utf8(bytes) == std::string_view::npos) {
      result.push_back(bytes);
    } else {
      result.insert(result.end(), bytes.size(), "\uFFFD");
    }
    bytes.clear();
  };
  for (std::string& token : tokens) {
    if (const auto byte = fallback_byte(token)) {
      bytes += *byte;
    } else {
      flush();
      result.push_back(std::move(token));
    }
  }
  flush();
  tokens = std::move(result);
}

void apply(decoders::Fuse, Tokens& tokens, size_t /*original*/) { tokens = {join(tokens)}; }

void apply(const decoders::Strip& step, Tokens& tokens, size_t /*original*/) {
  std::string content;
  append_utf8(step.content, content);
  for (std::string& token : tokens) {
    std::string_view rest = token;
    for (int64_t i = 0; i < step.start && rest.starts_with(content); ++i) rest.remove_prefix(content.size());
    for (int64_t i = 0; i < step.stop && rest.ends_with(content); ++i) rest.remove_suffix(content.size());
    token = std::string(rest);
  }
}

void apply(const decoders::Replace& step, Tokens& tokens, size_t original) {
  Regex::Workspace workspace;
  size_t size = 0;
  for (std::string& token : tokens) {
    std::string result;
    size_t done = 0;
    step.pattern.for_each_match(token, workspace, [&](size_t begin, size_t end) {
      result += std::string_view(token).substr(done, begin - done);
      result += step.content;
      done = end;
      check_growth(original, size + result.size());
    });
    result += std::string_view(token).substr(done);
    size += result.size();
    token = std::move(result);
  }
}

void apply(const decoders::Metaspace& step, Tokens& tokens, size_t /*original*/) {
  std::string replacement;
  append_utf8(step.replacement, replacement);
  for (size_t i = 0; i < tokens.size(); ++i) {
    const char* space = i == 0 && step.prepended ? "" : " ";
    std::string result;
    size_t done = 0;
    for (size_t found; (found = tokens[i].find(replacement, done)) != std::string::npos;) {
      result += std::string_view(tokens[i]).substr(done, found - done);
      result += space;
      done = found + replacement.size();
    }
    result += std::string_view(tokens[i]).substr(done);
    tokens[i] = std::move(result);
  }
}

template <class Step>
bool is(const Decoder& step) {
  return std::holds_alternative<Step>(step);
}

// Whether more tokens only add to the text, but for a character or a run of bytes that is cut.
bool only_appends(const std::vector<Decoder>& steps) {
  bool joined = false;
  for (const Decoder& step : steps) {
    if (joined) {
      const auto* strip = std::get_if<decoders::Strip>(&step);
      if (!is<decoders::Fuse>(step) && !(strip != nullptr && strip->stop == 0)) return false;
    }
    joined = joined || is<decoders::Fuse>(step) || is<decoders::ByteLevel>(step);
  }
  return true;
}

}  // namespace

size_t settled_bytes(const std::vector<Decoder>& steps, std::vector<std::string> tokens, std::string_view text) {
  constexpr std::string_view kReplacement = "\uFFFD";
  if (!only_appends(steps)) return 0;
  if (std::ranges::any_of(steps, is<decoders::ByteFallback>) && !tokens.empty() && fallback_byte(tokens.back())) {
    // Another byte may turn all of the run into U+FFFD.
    while (!tokens.empty() && fallback_byte(tokens.back())) tokens.pop_back();
    return decode(steps, std::move(tokens)).size();
  }
  const bool cut = std::ranges::any_of(steps, is<decoders::ByteLevel>) && text.ends_with(kReplacement);
  return cut ? text.size() - kReplacement.size() : text.size();
}

std::string decode(const std::vector<Decoder>& steps, std::vector<std::string> tokens) {
  if (steps.empty()) {  // as the package does, though no model wants it
    for (size_t i = 1; i < tokens.size(); ++i) tokens[i].insert(0, " ");
  }
  size_t original = 0;
  for (const std::string& token : tokens) original += token.size();
  for (const Decoder& step : steps) {
    std::visit([&](const auto& s) { apply(s, tokens, original); }, step);
  }
  return join(tokens);
}

}  // namespace baseq

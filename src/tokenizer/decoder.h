#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "regex.h"

namespace baseq {

/// Steps of the decoder of a tokenizer.json, by their names there.
namespace decoders {

struct ByteLevel {};
struct ByteFallback {};
struct Fuse {};
struct Strip {
  char32_t content;
  int64_t start, stop;  // at most so many of `content` go from either end of a token
};
struct Replace {
  Pattern pattern;
  std::string content;
};
struct Metaspace {
  char32_t replacement;
  bool prepended;  // the first token loses its replacements
};

}  // namespace decoders

using Decoder = std::variant<decoders::ByteLevel, decoders::ByteFallback, decoders::Fuse, decoders::Strip,
                             decoders::Replace, decoders::Metaspace>;

/// The text of `tokens` after all `steps`, valid UTF-8; U+FFFD stands where tokens cut a character.
std::string decode(const std::vector<Decoder>& steps, std::vector<std::string> tokens);

/// How many bytes at the start of `text`, the one of `tokens`, stay whatever tokens follow. 0 for steps that look at
/// the end of the text.
size_t settled_bytes(const std::vector<Decoder>& steps, std::vector<std::string> tokens, std::string_view text);

}  // namespace baseq

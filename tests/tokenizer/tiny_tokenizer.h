#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../io/temp_directory.h"
#include "baseq/tokenizer/tokenizer.h"

/// Small tokenizer.json files, made in the test and changed by it.
namespace baseq::test {

using nlohmann::json;
using Ids = std::vector<int32_t>;

inline std::string golden_path(const std::string& name) { return std::string(BASEQ_TEST_DATA) + "/tokenizer/" + name; }

inline json read_json(const std::string& path) {
  std::ifstream file(path);
  return json::parse(file);
}

// Loads `text` as a tokenizer.json through a file of its own.
inline Tokenizer load_text(const std::string& text) {
  const auto* test = testing::UnitTest::GetInstance()->current_test_info();
  const auto path = std::filesystem::path(testing::TempDir()) / (std::string(test->name()) + "_tokenizer.json");
  std::ofstream(path, std::ios::binary) << text;
  struct Remove {
    std::filesystem::path path;
    ~Remove() { std::filesystem::remove(path); }
  } remove{path};
  return Tokenizer(path);
}
inline Tokenizer load(const json& file) { return load_text(file.dump()); }

inline std::string utf8(char32_t c) {
  const auto tail = [&](int shift) { return static_cast<char>(0x80 | (c >> shift & 0x3F)); };
  if (c < 0x80) return {static_cast<char>(c)};
  if (c < 0x800) return {static_cast<char>(0xC0 | c >> 6), tail(0)};
  if (c < 0x10000) return {static_cast<char>(0xE0 | c >> 12), tail(6), tail(0)};
  return {static_cast<char>(0xF0 | c >> 18), tail(12), tail(6), tail(0)};
}

// The byte-level alphabet, written out from its definition.
inline std::vector<std::string> byte_alphabet() {
  std::vector<std::string> alphabet;
  char32_t next = 256;
  for (char32_t b = 0; b < 256; ++b) {
    const bool itself = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    alphabet.push_back(utf8(itself ? b : next++));
  }
  return alphabet;
}

// Ids 0..255 are the bytes; then come the merges' tokens.
inline json byte_tokenizer(const std::vector<std::pair<std::string, std::string>>& merges = {}) {
  json vocab = json::object();
  int32_t id = 0;
  for (const std::string& token : byte_alphabet()) vocab[token] = id++;
  json pairs = json::array();
  for (const auto& [left, right] : merges) {
    if (!vocab.contains(left + right)) vocab[left + right] = id++;
    pairs.push_back({left, right});
  }
  json file = json::parse(R"({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
    "normalizer": null, "post_processor": null,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
      {"type": "Digits", "individual_digits": true},
      {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
    "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false}})");
  file["model"]["vocab"] = vocab;
  file["model"]["merges"] = pairs;
  return file;
}

inline json added_token(const std::string& content, int32_t id) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

inline std::string random_text(std::mt19937& random, size_t num_chars) {
  std::string text;
  for (size_t i = 0; i < num_chars; ++i) {
    static constexpr char32_t kLimits[] = {0x20, 0x80, 0x80, 0x80, 0x800, 0xD800, 0x110000};
    char32_t c = random() % kLimits[random() % std::size(kLimits)];
    if (c >= 0xD800 && c < 0xE000) c = ' ';
    text += utf8(c);
  }
  return text;
}

// Every byte is a token, <0x00> to <0xFF> with the ids 0 to 255, and nothing merges: decoding gives back what the
// normalizer and the pre-tokenizer leave of a text.
inline json byte_fallback_tokenizer() {
  json file = byte_tokenizer();
  json vocab = json::object();
  for (int byte = 0; byte < 256; ++byte) {
    constexpr char kDigits[] = "0123456789ABCDEF";
    vocab[std::string("<0x") + kDigits[byte >> 4] + kDigits[byte & 15] + ">"] = byte;
  }
  file["model"]["vocab"] = vocab;
  file["model"]["byte_fallback"] = true;
  file["pre_tokenizer"] = nullptr;
  file["decoder"] = {{"type", "Sequence"}, {"decoders", {{{"type", "ByteFallback"}}, {{"type", "Fuse"}}}}};
  return file;
}

}  // namespace baseq::test

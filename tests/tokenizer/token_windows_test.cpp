#include "baseq/tokenizer/token_windows.h"

#include <gtest/gtest.h>

#include "../tiny_model.h"

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;

const std::filesystem::path kTokenizer = std::filesystem::path(BASEQ_TEST_DATA) / "tokenizer" / "tokenizer.json";

TEST(TokenizeFile, LinesOfJsonAreJoinedByAnEmptyLine) {
  const TempDirectory directory;
  test::write_bytes(directory / "lines.jsonl",
                    "{\"text\": \"first \\u00e9\"}\n\n{\"text\": \"second\", \"id\": 3}\r\n");
  test::write_bytes(directory / "plain.txt", "first \xc3\xa9\n\nsecond");
  const Tokenizer tokenizer(kTokenizer);
  EXPECT_TRUE(at::equal(tokenize_file(directory / "lines.jsonl", tokenizer),
                        tokenize_file(directory / "plain.txt", tokenizer)));
}

TEST(TokenizeFile, ABrokenLineOfJsonIsNamed) {
  const TempDirectory directory;
  const Tokenizer tokenizer(kTokenizer);
  for (const char* second : {"{\"text\": 3}", "{\"body\": \"x\"}", "[1]", "{\"text\": \"x\""}) {
    test::write_bytes(directory / "bad.jsonl", std::string("{\"text\": \"fine\"}\n") + second + "\n");
    expect_error([&] { tokenize_file(directory / "bad.jsonl", tokenizer); }, {"bad.jsonl", "line 2"});
  }
}

TEST(TokenizeFile, WhatIsWrongWithALineOfJsonIsSaid) {
  const TempDirectory directory;
  const Tokenizer tokenizer(kTokenizer);
  const std::vector<std::pair<const char*, const char*>> lines = {
      {"{\"text\": \"x\"", "is not valid JSON"},
      {"{\"messages\": []}", "chat template"},
      {"{\"body\": \"x\"}", "expected an object with a string \"text\""}};
  for (const auto& [line, said] : lines) {
    test::write_bytes(directory / "bad.JSONL", std::string(line) + "\n");
    expect_error([&] { tokenize_file(directory / "bad.JSONL", tokenizer); }, {"bad.JSONL: line 1", said});
  }
  test::write_bytes(directory / "array.parquet", "PAR1");
  expect_error([&] { tokenize_file(directory / "array.parquet", tokenizer); },
               {"array.parquet", "is Parquet", ".jsonl"});
  test::write_bytes(directory / "array.json", "[{\"text\": \"x\"}]");
  expect_error([&] { tokenize_file(directory / "array.json", tokenizer); }, {"array.json", ".jsonl"});
}

TEST(TokenizeFile, AByteOrderMarkIsNoText) {
  const TempDirectory directory;
  const Tokenizer tokenizer(kTokenizer);
  test::write_bytes(directory / "plain.txt", "some text");
  test::write_bytes(directory / "marked.txt", "\xef\xbb\xbfsome text");
  test::write_bytes(directory / "marked.jsonl", "\xef\xbb\xbf{\"text\": \"some text\"}");
  for (const char* name : {"marked.txt", "marked.jsonl"}) {
    EXPECT_TRUE(
        at::equal(tokenize_file(directory / name, tokenizer), tokenize_file(directory / "plain.txt", tokenizer)));
  }
}

TEST(TokenizeFile, AFileThatIsNoTextIsNamed) {
  const TempDirectory directory;
  test::write_bytes(directory / "latin.txt", "caf\xe9");
  expect_error([&] { tokenize_file(directory / "latin.txt", Tokenizer(kTokenizer)); },
               {"latin.txt", "not valid UTF-8"});
}

TEST(CheckTokenIds, NamesTheFileAndTheRange) {
  const Tensor ids = at::tensor({3, 9}, at::kLong);
  check_token_ids(ids, 10, "ids.safetensors");
  expect_error([&] { check_token_ids(ids, 9, "ids.safetensors"); }, {"ids.safetensors", "3 to 9", "0 to 8"});
  expect_error([&] { check_token_ids(ids - 4, 9, "ids.safetensors"); }, {"-1 to 5"});
}

TEST(SplitWindows, CutsWithoutOverlapAndDropsTheTail) {
  const Tensor ids = at::arange(23, at::kLong);
  EXPECT_TRUE(at::equal(split_windows(ids, 5, 0), at::arange(20, at::kLong).view({4, 5})));
  EXPECT_TRUE(at::equal(split_windows(ids, 5, 2), at::arange(10, at::kLong).view({2, 5})));
  EXPECT_EQ(split_windows(ids, 5, 9).size(0), 4);
  EXPECT_EQ(split_windows(ids, 23, 0).size(0), 1);
  expect_error([&] { split_windows(ids, 24, 0); }, {"23", "24"});
  expect_error([&] { split_windows(ids, 0, 0); }, {"at least 1"});
}

TEST(TokenIds, AreABatchOfOne) {
  const Tokenizer tokenizer(kTokenizer);
  const Tensor ids = token_ids(tokenizer, "Some text.");
  const std::vector<int32_t> encoded = tokenizer.encode("Some text.");
  ASSERT_EQ(ids.sizes(), at::IntArrayRef({1, static_cast<int64_t>(encoded.size())}));
  ASSERT_EQ(ids.scalar_type(), at::kLong);
  for (size_t i = 0; i < encoded.size(); ++i) EXPECT_EQ(ids[0][static_cast<int64_t>(i)].item<int64_t>(), encoded[i]);
}

}  // namespace
}  // namespace baseq

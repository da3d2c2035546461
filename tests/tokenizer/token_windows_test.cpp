#include "baseq/tokenizer/token_windows.h"

#include <gtest/gtest.h>

#include "../tiny_model.h"

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;

const std::filesystem::path kTokenizer = std::filesystem::path(BASEQ_TEST_DATA) / "tokenizer" / "tokenizer.json";

std::string long_text() {
  std::string text;
  for (int i = 0; i < 60; ++i) text += "Line " + std::to_string(i * i) + " of a text about quantization.\n";
  return text;
}

TEST(ReadCalibration, WindowsAreConsecutiveTokensOfTheText) {
  const TempDirectory directory;
  test::write_bytes(directory / "text.txt", long_text());
  const Tensor all = tokenize_file(directory / "text.txt", Tokenizer(kTokenizer));
  ASSERT_EQ(all.dim(), 1);
  ASSERT_EQ(all.scalar_type(), at::kLong);
  const Tensor windows =
      read_calibration(directory / "text.txt", kTokenizer, {.num_samples = 5, .seq_len = 17, .seed = 3});
  ASSERT_EQ(windows.sizes(), at::IntArrayRef({5, 17}));
  ASSERT_EQ(windows.scalar_type(), at::kLong);
  const Tensor every = all.unfold(0, 17, 1);
  for (int64_t i = 0; i < 5; ++i) EXPECT_TRUE((every == windows[i]).all(1).any().item<bool>()) << i;
}

TEST(ReadCalibration, SameSeedSameWindows) {
  const TempDirectory directory;
  test::write_bytes(directory / "text.txt", long_text());
  const auto windows = [&](uint64_t seed) {
    return read_calibration(directory / "text.txt", kTokenizer, {.num_samples = 8, .seq_len = 20, .seed = seed});
  };
  EXPECT_TRUE(at::equal(windows(1), windows(1)));
  EXPECT_FALSE(at::equal(windows(1), windows(2)));
}

TEST(ReadCalibration, IdsOfATextGiveTheWindowsOfTheText) {
  const TempDirectory directory;
  test::write_bytes(directory / "text.txt", long_text());
  const Tensor all = tokenize_file(directory / "text.txt", Tokenizer(kTokenizer));
  save_safetensors(directory / "ids.safetensors", {{"input_ids", all.to(at::kInt)}});
  const CalibrationOptions options{.num_samples = 5, .seq_len = 17, .seed = 3};
  EXPECT_TRUE(at::equal(read_calibration(directory / "ids.safetensors", "/nonexistent", options),
                        read_calibration(directory / "text.txt", kTokenizer, options)));
}

TEST(ReadCalibration, TheWholeTextIsOneWindowAndNoMoreFits) {
  const TempDirectory directory;
  test::write_bytes(directory / "text.txt", "One short text.");
  const Tensor all = tokenize_file(directory / "text.txt", Tokenizer(kTokenizer));
  const int64_t n = all.size(0);
  const Tensor windows = read_calibration(directory / "text.txt", kTokenizer, {.num_samples = 2, .seq_len = n});
  EXPECT_TRUE(at::equal(windows[0], all));
  expect_error([&] { read_calibration(directory / "text.txt", kTokenizer, {.num_samples = 1, .seq_len = n + 1}); },
               {"text.txt", std::to_string(n), std::to_string(n + 1)});
}

TEST(ReadCalibration, LinesOfJsonAreJoinedByAnEmptyLine) {
  const TempDirectory directory;
  test::write_bytes(directory / "lines.jsonl",
                    "{\"text\": \"first \\u00e9\"}\n\n{\"text\": \"second\", \"id\": 3}\r\n");
  test::write_bytes(directory / "plain.txt", "first \xc3\xa9\n\nsecond");
  const Tokenizer tokenizer(kTokenizer);
  EXPECT_TRUE(at::equal(tokenize_file(directory / "lines.jsonl", tokenizer),
                        tokenize_file(directory / "plain.txt", tokenizer)));
}

TEST(ReadCalibration, ABrokenLineOfJsonIsNamed) {
  const TempDirectory directory;
  const Tokenizer tokenizer(kTokenizer);
  for (const char* second : {"{\"text\": 3}", "{\"body\": \"x\"}", "[1]", "{\"text\": \"x\""}) {
    test::write_bytes(directory / "bad.jsonl", std::string("{\"text\": \"fine\"}\n") + second + "\n");
    expect_error([&] { tokenize_file(directory / "bad.jsonl", tokenizer); }, {"bad.jsonl", "line 2"});
  }
}

TEST(ReadCalibration, WhatIsWrongWithALineOfJsonIsSaid) {
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
  test::write_bytes(directory / "array.json", "[{\"text\": \"x\"}]");
  expect_error([&] { tokenize_file(directory / "array.json", tokenizer); }, {"array.json", ".jsonl"});
}

TEST(ReadCalibration, AByteOrderMarkIsNoText) {
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

TEST(ReadCalibration, AFileThatIsNoTextIsNamed) {
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

TEST(ReadCalibration, WindowsOfAFileAreItsFirst) {
  const TempDirectory directory;
  const Tensor ids = test::random_ids({4, 12}, 50, 1);
  save_safetensors(directory / "a.safetensors", {{"input_ids", ids}, {"other", at::zeros({2})}});
  save_safetensors(directory / "b.safetensors", {{"tokens", ids.to(at::kInt)}});
  const CalibrationOptions options{.num_samples = 3, .seq_len = 10};
  const Tensor expected = ids.narrow(0, 0, 3).narrow(1, 0, 10);
  for (const char* name : {"a.safetensors", "b.safetensors"}) {
    const Tensor windows = read_calibration(directory / name, {}, options);
    EXPECT_EQ(windows.scalar_type(), at::kLong);
    EXPECT_TRUE(at::equal(windows, expected)) << name;
  }
}

TEST(ReadCalibration, UnfitWindowsAreRefused) {
  const TempDirectory directory;
  const Tensor ids = test::random_ids({4, 12}, 50, 1);
  const auto read = [&](const std::map<std::string, Tensor>& tensors, const CalibrationOptions& options) {
    save_safetensors(directory / "w.safetensors", tensors);
    read_calibration(directory / "w.safetensors", {}, options);
  };
  expect_error([&] { read({{"input_ids", ids}}, {.num_samples = 5, .seq_len = 12}); }, {"w.safetensors", "4", "5"});
  expect_error([&] { read({{"input_ids", ids}}, {.num_samples = 4, .seq_len = 13}); }, {"12", "13"});
  expect_error([&] { read({{"a", ids}, {"b", ids}}, {.num_samples = 1, .seq_len = 2}); }, {"input_ids"});
  expect_error([&] { read({{"input_ids", ids.to(at::kFloat)}}, {.num_samples = 1, .seq_len = 2}); }, {"integer"});
  expect_error([&] { read({{"input_ids", ids.unsqueeze(0)}}, {.num_samples = 1, .seq_len = 2}); }, {"integer windows"});
}

TEST(ReadCalibration, MissingFilesAreNamed) {
  const TempDirectory directory;
  test::write_bytes(directory / "text.txt", long_text());
  expect_error([&] { read_calibration(directory / "none.txt", kTokenizer, {}); }, {"none.txt"});
  expect_error([&] { read_calibration(directory / "text.txt", directory / "tokenizer.json", {}); }, {"tokenizer.json"});
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

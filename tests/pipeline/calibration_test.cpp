#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "../tiny_model.h"
#include "baseq/formats/open_model.h"
#include "baseq/pipeline/job.h"
#include "baseq/runtime/chat_template.h"
#include "baseq/tokenizer/token_windows.h"

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;
using test::write_bytes;
using Split = CalibrationData::Split;

const std::filesystem::path kTokenizer = std::filesystem::path(BASEQ_TEST_DATA) / "tokenizer" / "tokenizer.json";

std::string numbered_lines(int first, int count) {
  std::string text;
  for (int i = first; i < first + count; ++i) {
    text += "Line " + std::to_string(i * i) + " of a text about quantization.\n";
  }
  return text;
}

/// A model's directory with a tokenizer and nothing else, in which the files of a test lie.
class ReadCalibration : public testing::Test {
 protected:
  ReadCalibration() { std::filesystem::copy_file(kTokenizer, directory / "tokenizer.json"); }

  /// Its template is ChatML's; "<|im_end|>" is a token of it, and EOS.
  void make_chat_model() {
    write_bytes(directory / "tokenizer_config.json",
                nlohmann::json{{"eos_token", "<|im_end|>"},
                               {"chat_template",
                                "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
                                "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"}}
                    .dump());
  }

  Job job(int64_t num_samples, int64_t seq_len, uint64_t seed = 0) const {
    Job result{.model = std::filesystem::path(directory / "."), .options = {.seed = seed}};
    result.recipe.num_samples = num_samples;
    result.recipe.seq_len = seq_len;
    return result;
  }

  Tensor windows(const char* file, int64_t num_samples, int64_t seq_len, uint64_t seed = 0) const {
    return calibration_windows(directory / file, job(num_samples, seq_len, seed));
  }
  CalibrationWindows read(const std::vector<CalibrationData::File>& files, Split split, const Job& asked) const {
    CalibrationData data{.split = split};
    for (const auto& [name, weight] : files)
      data.files.push_back({.path = directory / name.string(), .weight = weight});
    return read_calibration(data, asked);
  }
  /// Texts as lines of a .jsonl file.
  void write_texts(const char* file, const std::vector<std::string>& texts) const {
    std::string lines;
    for (const std::string& text : texts) lines += nlohmann::json{{"text", text}}.dump() + "\n";
    write_bytes(directory / file, lines);
  }
  std::vector<int64_t> ids_of(const std::string& text) const {
    const std::vector<int32_t> ids = open_tokenizer(directory / ".").encode(text);
    return {ids.begin(), ids.end()};
  }
  int64_t eos() const { return *open_tokenizer(directory / ".").added_token("<|im_end|>"); }

  const TempDirectory directory;
};

std::vector<int64_t> values_of(const Tensor& ids) {
  const Tensor flat = ids.flatten().contiguous();
  return {flat.const_data_ptr<int64_t>(), flat.const_data_ptr<int64_t>() + flat.numel()};
}

// One file, cut anywhere.

TEST_F(ReadCalibration, WindowsAreConsecutiveTokensOfTheText) {
  write_bytes(directory / "text.txt", numbered_lines(0, 60));
  const Tensor all = tokenize_file(directory / "text.txt", Tokenizer(kTokenizer));
  const Tensor found = windows("text.txt", 5, 17, 3);
  ASSERT_EQ(found.sizes(), at::IntArrayRef({5, 17}));
  ASSERT_EQ(found.scalar_type(), at::kLong);
  EXPECT_TRUE(at::equal(found, draw_windows(all, 5, 17, 3, "text.txt")));
  const Tensor every = all.unfold(0, 17, 1);
  for (int64_t i = 0; i < 5; ++i) EXPECT_TRUE((every == found[i]).all(1).any().item<bool>()) << i;
}

TEST_F(ReadCalibration, SameSeedSameWindows) {
  write_bytes(directory / "text.txt", numbered_lines(0, 60));
  EXPECT_TRUE(at::equal(windows("text.txt", 8, 20, 1), windows("text.txt", 8, 20, 1)));
  EXPECT_FALSE(at::equal(windows("text.txt", 8, 20, 1), windows("text.txt", 8, 20, 2)));
}

TEST_F(ReadCalibration, IdsOfATextGiveTheWindowsOfTheText) {
  write_bytes(directory / "text.txt", numbered_lines(0, 60));
  const Tensor all = tokenize_file(directory / "text.txt", Tokenizer(kTokenizer));
  save_safetensors(directory / "ids.safetensors", {{"input_ids", all.to(at::kInt)}});
  const Tensor expected = windows("text.txt", 5, 17, 3);
  std::filesystem::remove(directory / "tokenizer.json");
  EXPECT_TRUE(at::equal(windows("ids.safetensors", 5, 17, 3), expected));
}

TEST_F(ReadCalibration, LinesOfJsonAreOneText) {
  write_texts("lines.jsonl", {"", numbered_lines(0, 20), "second", numbered_lines(20, 20)});
  write_bytes(directory / "plain.txt", numbered_lines(0, 20) + "\n\nsecond\n\n" + numbered_lines(20, 20));
  EXPECT_TRUE(at::equal(windows("lines.jsonl", 6, 30, 4), windows("plain.txt", 6, 30, 4)));
}

TEST_F(ReadCalibration, TheWholeTextIsOneWindowAndNoMoreFits) {
  write_bytes(directory / "text.txt", "One short text.");
  const Tensor all = tokenize_file(directory / "text.txt", Tokenizer(kTokenizer));
  const int64_t n = all.size(0);
  EXPECT_TRUE(at::equal(windows("text.txt", 2, n)[0], all));
  expect_error([&] { windows("text.txt", 1, n + 1); }, {"text.txt", std::to_string(n), std::to_string(n + 1)});
}

TEST_F(ReadCalibration, WindowsOfAFileAreItsFirst) {
  const Tensor ids = test::random_ids({4, 12}, 50, 1);
  save_safetensors(directory / "a.safetensors", {{"input_ids", ids}, {"other", at::zeros({2})}});
  save_safetensors(directory / "b.safetensors", {{"tokens", ids.to(at::kInt)}});
  const Tensor expected = ids.narrow(0, 0, 3).narrow(1, 0, 10);
  for (const char* name : {"a.safetensors", "b.safetensors"}) {
    const Tensor found = windows(name, 3, 10);
    EXPECT_EQ(found.scalar_type(), at::kLong);
    EXPECT_TRUE(at::equal(found, expected)) << name;
  }
}

TEST_F(ReadCalibration, UnfitWindowsAreRefused) {
  const Tensor ids = test::random_ids({4, 12}, 50, 1);
  const auto from = [&](const std::map<std::string, Tensor>& tensors, int64_t num_samples, int64_t seq_len) {
    save_safetensors(directory / "w.safetensors", tensors);
    windows("w.safetensors", num_samples, seq_len);
  };
  expect_error([&] { from({{"input_ids", ids}}, 5, 12); }, {"w.safetensors", "4", "5"});
  expect_error([&] { from({{"input_ids", ids}}, 4, 13); }, {"12", "13"});
  expect_error([&] { from({{"a", ids}, {"b", ids}}, 1, 2); }, {"input_ids"});
  expect_error([&] { from({{"input_ids", ids.to(at::kFloat)}}, 1, 2); }, {"integer"});
  expect_error([&] { from({{"input_ids", ids.unsqueeze(0)}}, 1, 2); }, {"integer windows"});
}

TEST_F(ReadCalibration, MissingFilesAreNamed) {
  write_bytes(directory / "text.txt", numbered_lines(0, 10));
  expect_error([&] { windows("none.txt", 1, 8); }, {"none.txt"});
  expect_error([&] { read_calibration({}, job(1, 8)); }, {"`files`"});
  std::filesystem::remove(directory / "tokenizer.json");
  expect_error([&] { windows("text.txt", 1, 8); }, {"tokenizer.json"});
}

// Several files.

TEST_F(ReadCalibration, FilesTakeTurnsByTheirWeights) {
  write_bytes(directory / "a.txt", numbered_lines(0, 60));
  std::string other;
  for (int i = 0; i < 60; ++i) other += "Words that are not there: " + std::to_string(i * 7) + "; ";
  write_bytes(directory / "b.txt", other);
  save_safetensors(directory / "c.safetensors", {{"input_ids", test::random_ids({4, 20}, 50, 1)}});
  const Job asked = job(8, 20, 5);
  const CalibrationWindows mixed = read({{"a.txt", 5}, {"b.txt", 2}, {"c.safetensors", 1}}, Split::kRandom, asked);
  ASSERT_EQ(mixed.windows.sizes(), at::IntArrayRef({8, 20}));
  ASSERT_EQ(mixed.files.size(), 3U);
  EXPECT_EQ(mixed.files[0].windows, 5);
  EXPECT_EQ(mixed.files[1].windows, 2);
  EXPECT_EQ(mixed.files[2].windows, 1);
  EXPECT_EQ(mixed.files[0].documents, 1);
  EXPECT_EQ(mixed.files[0].tokens, static_cast<int64_t>(ids_of(numbered_lines(0, 60)).size()));
  EXPECT_EQ(mixed.files[2].documents, 0);
  EXPECT_EQ(mixed.files[2].tokens, 80);
  // The first file has the windows that it has alone; those of the second lie among them.
  const Tensor alone = windows("a.txt", 5, 20, 5);
  std::vector<Tensor> of_first;
  std::string order;
  for (int64_t i = 0; i < 8; ++i) {
    const Tensor window = mixed.windows[i];
    const auto in = [&](const char* file) {
      return (tokenize_file(directory / file, Tokenizer(kTokenizer)).unfold(0, 20, 1) == window).all(1).any();
    };
    const bool first = in("a.txt").item<bool>();
    order += first ? 'a' : in("b.txt").item<bool>() ? 'b' : 'c';
    if (first) of_first.push_back(window);
  }
  EXPECT_EQ(order, "abaacaba");
  EXPECT_TRUE(at::equal(at::stack(of_first), alone));
  EXPECT_TRUE(at::equal(read({{"a.txt", 5}, {"b.txt", 2}, {"c.safetensors", 1}}, Split::kRandom, asked).windows,
                        mixed.windows));
}

TEST_F(ReadCalibration, AFileThatIsGivenTwiceHasOtherWindowsTheSecondTime) {
  write_bytes(directory / "a.txt", numbered_lines(0, 60));
  const Tensor mixed = read({{"a.txt"}, {"a.txt"}}, Split::kRandom, job(2, 20)).windows;
  EXPECT_FALSE(at::equal(mixed[0], mixed[1]));
}

TEST_F(ReadCalibration, WeightsThatGiveNothingAreRefused) {
  write_bytes(directory / "a.txt", numbered_lines(0, 60));
  const auto from = [&](double first, double second) {
    read({{"a.txt", first}, {"a.txt", second}}, Split::kRandom, job(4, 20));
  };
  for (const double bad : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    expect_error([&] { from(1, bad); }, {"a.txt: its weight is", "positive"});
  }
  expect_error([&] { from(1, 100); }, {"a.txt: its weight of 1 among 101 gives it none of the 4 windows"});
}

// Documents.

TEST_F(ReadCalibration, PackedDocumentsFollowOneAnotherInTheOrderOfTheSeed) {
  make_chat_model();
  const std::vector<std::string> texts{"first one", "and a second, longer one", "third", "the fourth of them", "last"};
  write_texts("texts.jsonl", texts);
  std::vector<std::vector<int64_t>> pieces;
  int64_t total = 0;
  for (const std::string& text : texts) {
    pieces.push_back(ids_of(text));
    pieces.back().push_back(eos());
    total += static_cast<int64_t>(pieces.back().size());
  }
  std::set<std::vector<int64_t>> orders;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    const CalibrationWindows packed = read({{"texts.jsonl"}}, Split::kPacked, job(1, total, seed));
    EXPECT_EQ(packed.files[0].tokenized, 5);
    EXPECT_EQ(packed.files[0].tokens, total);
    std::vector<int64_t> rest = values_of(packed.windows);
    orders.insert(rest);
    // All of them in some order: none is the start of another.
    for (size_t taken = 0; taken < pieces.size(); ++taken) {
      const auto found = std::ranges::find_if(pieces, [&](const std::vector<int64_t>& piece) {
        return piece.size() <= rest.size() && std::equal(piece.begin(), piece.end(), rest.begin());
      });
      ASSERT_NE(found, pieces.end()) << seed;
      rest.erase(rest.begin(), rest.begin() + static_cast<int64_t>(found->size()));
    }
    EXPECT_TRUE(rest.empty());
  }
  EXPECT_GT(orders.size(), 5U);
}

TEST_F(ReadCalibration, NoMoreDocumentsAreTokenizedThanItTakes) {
  make_chat_model();
  std::vector<std::string> texts;
  for (int i = 0; i < 50; ++i) texts.push_back(numbered_lines(i, 2));
  write_texts("texts.jsonl", texts);
  const CalibrationWindows packed = read({{"texts.jsonl"}}, Split::kPacked, job(2, 16));
  EXPECT_EQ(packed.files[0].documents, 50);
  EXPECT_LT(packed.files[0].tokenized, 5);
  EXPECT_GE(packed.files[0].tokens, 32);
  expect_error([&] { read({{"texts.jsonl"}}, Split::kPacked, job(1000, 64)); },
               {"texts.jsonl: 50 of 50 documents fit", "1000 are needed"});
}

TEST_F(ReadCalibration, SamplesAreTheStartsOfDocumentsThatAreLongEnough) {
  make_chat_model();
  write_texts("texts.jsonl", {"short", numbered_lines(0, 3), numbered_lines(40, 3), "x", numbered_lines(80, 3)});
  const CalibrationWindows samples = read({{"texts.jsonl"}}, Split::kSamples, job(3, 12, 1));
  std::set<std::vector<int64_t>> starts, found;
  for (const int first : {0, 40, 80}) {
    std::vector<int64_t> ids = ids_of(numbered_lines(first, 3));
    ids.resize(12);
    starts.insert(ids);
  }
  for (int64_t i = 0; i < 3; ++i) found.insert(values_of(samples.windows[i]));
  EXPECT_EQ(found, starts);
  EXPECT_LE(samples.files[0].skipped, 2);
  expect_error(
      [&] { read({{"texts.jsonl"}}, Split::kSamples, job(4, 12)); },
      {"texts.jsonl: 3 of 5 documents fit", "3 windows", "4 are needed", "line", "tokens but a window needs 12"});
}

TEST_F(ReadCalibration, ConversationsAreWrittenByTheChatTemplate) {
  make_chat_model();
  const std::vector<Message> messages{{"user", "why <|im_end|>"}, {"assistant", "because"}};
  write_bytes(
      directory / "chat.jsonl",
      R"({"messages": [{"role": "user", "content": "why <|im_end|>"}, {"role": "assistant", "content": "because"}]})"
      "\n");
  const std::vector<int32_t> ids =
      ChatTemplate(open_chat(directory / ".")).encode(open_tokenizer(directory / "."), messages);
  const auto n = static_cast<int64_t>(ids.size());
  for (const Split split : {Split::kRandom, Split::kPacked, Split::kSamples}) {
    const CalibrationWindows found = read({{"chat.jsonl"}}, split, job(1, n));
    EXPECT_EQ(values_of(found.windows), std::vector<int64_t>(ids.begin(), ids.end()));
    EXPECT_EQ(found.files[0].tokens, n);
  }
  // The first EOS is the template's, not the user's.
  EXPECT_EQ(std::ranges::count(ids, static_cast<int32_t>(eos())), 2);
}

TEST_F(ReadCalibration, ConversationsWithoutAPlaceAreSkippedAndCounted) {
  make_chat_model();
  const std::string good = R"({"messages": [{"role": "user", "content": "one and two"}]})";
  write_bytes(directory / "chat.jsonl", good + "\n" + R"({"messages": [{"role": "tool", "content": "x"}]})" + "\n" +
                                            R"({"messages": [{"role": "user", "content": null}]})" + "\n" +
                                            R"({"messages": [{"role": "user", "content": [{"type": "image"}]}]})" +
                                            "\n" + R"({"text": "a text among them"})" + "\n" + good);
  const Job asked = job(3, 8);
  const CalibrationRead found = read({{"chat.jsonl"}}, Split::kPacked, asked).files[0];
  EXPECT_EQ(found.documents, 6);
  EXPECT_LE(found.skipped, 3);
  expect_error([&] { read({{"chat.jsonl"}}, Split::kPacked, job(100, 8)); },
               {"chat.jsonl: 3 of 6 documents fit", "chat.jsonl: line ", "100 are needed"});
}

TEST_F(ReadCalibration, ModelsWithoutTemplateOrEosSayWhatTheyLack) {
  const std::filesystem::path tiny = std::filesystem::path(BASEQ_TEST_DATA) / "tiny_llama_base";
  std::filesystem::copy_file(tiny / "model.safetensors", directory / "model.safetensors");
  nlohmann::json config = nlohmann::json::parse(test::read_bytes(tiny / "config.json"));
  config.erase("eos_token_id");
  write_bytes(directory / "config.json", config.dump());
  write_bytes(directory / "chat.jsonl", R"({"messages": [{"role": "user", "content": "one"}]})");
  write_texts("texts.jsonl", {"one", "two"});
  expect_error([&] { windows("chat.jsonl", 1, 2); }, {"has no chat template"});
  expect_error([&] { read({{"texts.jsonl"}}, Split::kPacked, job(1, 2)); }, {"names no EOS token"});
  config["eos_token_id"] = {7, 8};
  write_bytes(directory / "config.json", config.dump());
  const auto n = static_cast<int64_t>(ids_of("one").size() + ids_of("two").size()) + 2;
  EXPECT_EQ(values_of(read({{"texts.jsonl"}}, Split::kPacked, job(1, n)).windows).back(), 7);
}

TEST_F(ReadCalibration, LinesThatAreNoDocumentsAreNamed) {
  make_chat_model();
  const std::vector<std::pair<std::string, const char*>> lines = {
      {"{\"text\": \"x\"", "is not valid JSON"},
      {"{\"text\": \"\xff\"}", "is not valid JSON"},
      {"{\"text\": \"\\ud800\"}", "is not valid JSON"},
      {std::string(100'000, '['), "is not valid JSON"},
      {std::string(100'000, '[') + std::string(100'000, ']'), "expected an object"},
      {"{\"text\": 3}", "a string \"text\" or a list \"messages\""},
      {"{\"text\": null, \"messages\": []}", "a string \"text\" or a list \"messages\""},
      {"{\"body\": \"x\"}", "a string \"text\" or a list \"messages\""},
      {"[1]", "a string \"text\" or a list \"messages\""},
      {"{\"messages\": []}", "\"messages\" is no list of messages"},
      {"{\"messages\": \"x\"}", "\"messages\" is no list of messages"},
      {"{\"messages\": {\"role\": \"user\", \"content\": \"x\"}}", "\"messages\" is no list of messages"},
      {"{\"messages\": [3]}", "message 1 is no object"},
      {"{\"messages\": [{\"role\": \"user\", \"content\": \"x\"}, {\"content\": \"x\"}]}", "message 2 is no object"},
      {"{\"messages\": [{\"role\": 3, \"content\": \"x\"}]}", "message 1 is no object"},
      {"{\"messages\": [{\"role\": \"user\"}]}", "message 1 is no object"}};
  for (const auto& [line, said] : lines) {
    write_bytes(directory / "bad.jsonl", "{\"text\": \"fine\"}\n\n" + line + "\n");
    expect_error([&] { windows("bad.jsonl", 1, 2); }, {"bad.jsonl: line 3: ", said});
  }
  write_bytes(directory / "empty.jsonl", "\n \r\n");
  expect_error([&] { windows("empty.jsonl", 1, 2); }, {"empty.jsonl: holds no documents"});
}

TEST_F(ReadCalibration, ParquetIsRefusedWithAWayOut) {
  write_bytes(directory / "data.parquet", "PAR1");
  expect_error([&] { windows("data.parquet", 1, 2); },
               {"data.parquet: is Parquet", "pandas.read_parquet('", ".to_json('", "data.jsonl'"});
}

}  // namespace
}  // namespace baseq

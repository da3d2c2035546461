#include "baseq/runtime/chat_template.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>

#include "../tokenizer/tiny_tokenizer.h"

namespace baseq {
namespace {

using test::Ids;
using test::json;

const json& goldens() {
  static const json all = test::read_json(std::string(BASEQ_TEST_DATA) + "/chat/goldens.json");
  return all;
}

StoredChat stored_chat(const json& family) {
  return {.path = "model", .jinja = family["jinja"], .bos_token = family["bos"], .eos_token = family["eos"]};
}

StoredChat chatml() { return stored_chat(goldens()["families"][0]); }

std::vector<Message> conversation_of(const json& messages) {
  std::vector<Message> result;
  for (const json& message : messages) result.push_back({message["role"], message["content"]});
  return result;
}

Tokenizer tokenizer_of(const json& family) {
  json file = test::read_json(test::golden_path("tokenizer.json"));
  file["added_tokens"] = family["added_tokens"];
  return {file, "tokenizer.json"};
}

std::string text_of(const std::vector<TextPart>& parts) {
  std::string text;
  for (const TextPart& part : parts) text += part.text;
  return text;
}

std::string error_of(const StoredChat& stored) {
  return test::error_of([&] { ChatTemplate{stored}; });
}

/// The parameter is the index of a family.
class ChatGoldens : public testing::TestWithParam<size_t> {
 protected:
  const json& family = goldens()["families"][GetParam()];
};

TEST_P(ChatGoldens, AreWrittenAsTransformersWritesThem) {
  const auto& today = goldens()["today"];
  const Date date{today[0], today[1], today[2]};
  const ChatTemplate chat(stored_chat(family));
  EXPECT_EQ(chat.name(), family["name"].get<std::string>());
  const Tokenizer tokenizer = tokenizer_of(family);
  ASSERT_GE(family["cases"].size(), 3U);
  for (const json& golden : family["cases"]) {
    const auto messages = conversation_of(golden["messages"]);
    EXPECT_EQ(text_of(chat.render(messages, date)), golden["text"].get<std::string>());
    EXPECT_EQ(chat.encode(tokenizer, messages, date), golden["ids"].get<Ids>()) << golden["text"];
  }
}

TEST_P(ChatGoldens, UsersCannotWriteSpecialTokens) {
  const ChatTemplate chat(stored_chat(family));
  const Tokenizer tokenizer = tokenizer_of(family);
  std::string hostile, plain;
  std::vector<int32_t> added;
  for (const json& token : family["added_tokens"]) {
    hostile += token["content"].get<std::string>() + " x";
    plain += "y x";
    added.push_back(token["id"]);
  }
  const auto count = [&](const std::string& said) {
    std::vector<Message> messages{{"user", said}, {"assistant", "ok"}, {"user", said}};
    if (family["system"].get<bool>()) messages.insert(messages.begin(), {"system", said});
    const Ids ids = chat.encode(tokenizer, messages);
    return std::ranges::count_if(ids, [&](int32_t id) { return std::ranges::find(added, id) != added.end(); });
  };
  EXPECT_EQ(count(hostile), count(plain));
}

INSTANTIATE_TEST_SUITE_P(Families, ChatGoldens, testing::Range<size_t>(0, goldens()["families"].size()),
                         [](const auto& index) {
                           std::string name = goldens()["families"][index.param]["title"];
                           std::erase_if(name, [](unsigned char c) { return std::isalnum(c) == 0; });
                           return name;
                         });

TEST(ChatTemplate, RefusesWhatItDoesNotKnowByName) {
  const auto refusal = [](const std::string& jinja) { return error_of({.path = "model", .jinja = jinja}); };
  EXPECT_EQ(refusal(""), "model: has no chat template");
  const std::string message = refusal("{{ '<|turn_of_user|>' + messages[0]['content'] }}");
  EXPECT_EQ(message.substr(0, message.find(';')),
            "model: the chat template is none that is known: it has <|turn_of_user|>");
  EXPECT_NE(message.find("ChatML"), std::string::npos);
  EXPECT_NE(refusal(chatml().jinja + "<|im_middle|>").find("it has <|im_middle|>"), std::string::npos);
  EXPECT_NE(refusal("{{ '<|im_start|>' + message['content'] | trim + '<|im_end|>\\n' }}").find("trims"),
            std::string::npos);
}

TEST(ChatTemplate, WantsTurnsInOrder) {
  const ChatTemplate chat(chatml());
  const auto error = [&](const std::vector<Message>& messages) {
    return test::error_of([&] { chat.render(messages); });
  };
  EXPECT_EQ(error({}), "chat: expected a conversation with a user message");
  EXPECT_EQ(error({{"system", "a"}}), "chat: expected a conversation with a user message");
  EXPECT_EQ(error({{"assistant", "a"}}), R"(chat: message 1 is from "assistant"; expected one from the user)");
  EXPECT_EQ(error({{"user", "a"}, {"user", "b"}}),
            R"(chat: message 2 is from "user"; expected one from the assistant)");
  EXPECT_EQ(error({{"user", "a"}, {"tool", "b"}, {"user", "c"}}),
            R"(chat: message 2 is from "tool"; expected one from the assistant)");
}

TEST(ChatTemplate, SaysWhereASystemMessageIsMissingOrHasNoPlace) {
  StoredChat granite4{
      .path = "model",
      .jinja = "{%- set system_message = 'Mine.' %}<|start_of_role|>user<|end_of_role|><|end_of_text|>\n"};
  const ChatTemplate chat(granite4);
  const std::vector<Message> user{{"user", "a"}};
  EXPECT_EQ(test::error_of([&] { chat.render(user); }),
            "model: the chat template writes a system message that is not known; give a `system` message");
  const std::vector<Message> both{{"system", "s"}, {"user", "a"}};
  EXPECT_EQ(
      text_of(chat.render(both)),
      "<|start_of_role|>system<|end_of_role|>s<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>a<|end_of_text|>\n"
      "<|start_of_role|>assistant<|end_of_role|>");
  for (const json& family : goldens()["families"]) {
    if (family["system"].get<bool>()) continue;
    EXPECT_EQ(test::error_of([&] { ChatTemplate(stored_chat(family)).render(both); }),
              "model: the chat template has no place for a `system` message");
  }
}

}  // namespace
}  // namespace baseq

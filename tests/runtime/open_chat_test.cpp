#include <gtest/gtest.h>

#include "../io/temp_directory.h"
#include "baseq/formats/open_model.h"

namespace baseq {
namespace {

class OpenChat : public testing::Test {
 protected:
  void write(const char* name, const std::string& content) { test::write_bytes(directory.path() / name, content); }
  StoredChat open() { return open_chat(directory.path()); }
  test::TempDirectory directory;
};

TEST_F(OpenChat, WithoutFilesThereIsNoTemplate) {
  EXPECT_EQ(open().jinja, "");
  EXPECT_EQ(open().path, directory.path().string());
}

TEST_F(OpenChat, TokensAreTextsOrObjects) {
  write("tokenizer_config.json", R"({"chat_template": "{{ 1 }}", "bos_token": {"content": "<s>"}, "eos_token": null})");
  write("special_tokens_map.json", R"({"bos_token": "other", "eos_token": "</s>"})");
  EXPECT_EQ(open().jinja, "{{ 1 }}");
  EXPECT_EQ(open().bos_token, "<s>");
  EXPECT_EQ(open().eos_token, "</s>");
}

TEST_F(OpenChat, OfSeveralTemplatesTheDefaultOneCountsAndAFileOfItsOwnMost) {
  write("tokenizer_config.json", R"({"chat_template": [{"name": "tool_use", "template": "tools"}, {"name": 3},
                                                       {"name": "default", "template": "plain"}]})");
  EXPECT_EQ(open().jinja, "plain");
  write("chat_template.jinja", "file");
  EXPECT_EQ(open().jinja, "file");
}

}  // namespace
}  // namespace baseq

#include "io/json_object.h"

#include <gtest/gtest.h>

#include "temp_directory.h"

namespace baseq {
namespace {

using nlohmann::json;
using test::expect_error;

TEST(JsonObject, ReadsEachTypeAndFallsBack) {
  const json value = json::parse(
      R"({"b": true, "i": -3, "n": 2.5, "whole": 2, "t": "x", "c": "two", "l": ["p", "q"], "v": [1, 2.5],
          "o": {"k": 1}, "z": null, "a": [{"k": 2}, null, {}]})");
  JsonObject object(value, "file");
  EXPECT_TRUE(object.boolean("b", false));
  EXPECT_EQ(object.integer("i", 0, -5, 5), -3);
  EXPECT_DOUBLE_EQ(object.number("n", 0, 0, 3), 2.5);
  EXPECT_DOUBLE_EQ(object.number("whole", 0, 0, 3), 2.0);
  EXPECT_EQ(object.text("t", ""), "x");
  EXPECT_EQ(object.choice("c", 0, {"one", "two"}), 1u);
  EXPECT_EQ(object.texts("l"), (std::vector<std::string>{"p", "q"}));
  EXPECT_EQ(object.numbers("v", 0, 3), (std::vector<double>{1.0, 2.5}));
  EXPECT_EQ(object.choices("l", {"q", "p"}), (std::vector<size_t>{1, 0}));
  EXPECT_EQ(object.object("o").integer("k", 0, 0, 9), 1);
  EXPECT_EQ(object.object("o").keys(), std::vector<std::string>{"k"});
  EXPECT_EQ(object.objects("a").size(), 2U);
  EXPECT_EQ(object.objects("a")[0].integer("k", 0, 0, 9), 2);
  object.ignore("z");
  object.finish();

  EXPECT_TRUE(object.boolean("absent", true));
  EXPECT_EQ(object.integer("absent", 7, 0, 1), 7);
  EXPECT_EQ(object.text("absent", "y"), "y");
  EXPECT_EQ(object.choice("absent", 1, {"one", "two"}), 1u);
  EXPECT_TRUE(object.texts("absent").empty());
  EXPECT_TRUE(object.numbers("absent", 0, 1).empty());
  EXPECT_TRUE(object.objects("absent").empty());
}

TEST(JsonObject, LargeValuesMakeShortMessages) {
  const json value = {{"s", std::string(1'000'000, 'x')}, {"l", std::vector<int>(1'000'000, 1)}, {"k", "\u00e9"}};
  JsonObject object(value, "file");
  for (const char* key : {"s", "l"}) {
    const std::string message = test::error_of([&] { object.integer(key, 0, 0, 9); });
    EXPECT_TRUE(message.ends_with("...")) << message;
    EXPECT_LT(message.size(), 300U);
  }
  expect_error([&] { object.integer("k", 0, 0, 9); }, {"got \"\u00e9\""});
  expect_error(
      [&] {
        JsonObject(json::array({json::object({{"a", {1, nullptr}}}), 2}), "file");
      },
      {R"(expected an object, got [{"a":[1,null]},2])"});
  json many;
  for (int i = 0; i < 100'000; ++i) many["key" + std::to_string(i)] = 0;
  const std::string message = test::error_of([&] { JsonObject(many, "file").finish(); });
  EXPECT_NE(message.find("\" and 99990 more; known are"), message.npos) << message.substr(0, 1000);
}

TEST(JsonFile, IsNotReadWithoutEnd) {
  const test::TempDirectory directory;
  test::write_bytes(directory / "x.json", "");
  std::filesystem::resize_file(directory / "x.json", (size_t{64} << 20) + 1);
  expect_error([&] { read_json_file((directory / "x.json").string()); }, {"x.json", "more than 67108864 bytes"});
}

TEST(JsonObject, NullIsAbsent) {
  const json value = json::parse(R"({"z": null})");
  JsonObject object(value, "file");
  EXPECT_FALSE(object.contains("z"));
  EXPECT_EQ(object.integer("z", 7, 0, 9), 7);
  expect_error([&] { object.object("z"); }, {"file", "z", "missing"});
}

TEST(JsonObject, AnotherTypeIsAnErrorWithItsPath) {
  const json value =
      json::parse(R"({"s": "four", "n": 1.5, "i": 1, "l": [1], "o": {"k": "v"}, "big": 18446744073709551615})");
  JsonObject object(value, "recipe.json");
  expect_error([&] { object.integer("s", 0, 0, 9); }, {"recipe.json", "s", "integer", "\"four\""});
  expect_error([&] { object.integer("n", 0, 0, 9); }, {"n", "integer", "1.5"});
  expect_error([&] { object.integer("big", 0, 0, INT64_MAX); }, {"big", "18446744073709551615"});
  expect_error([&] { object.integer("i", 0, 2, 9); }, {"i", "2", "9"});
  expect_error([&] { object.number("s", 0, 0, 9); }, {"s", "number"});
  expect_error([&] { object.number("n", 0, 2, 9); }, {"n", "1.5"});
  expect_error([&] { object.boolean("i", false); }, {"i", "true or false"});
  expect_error([&] { object.text("i", ""); }, {"i", "string"});
  expect_error([&] { object.texts("l"); }, {"l", "strings"});
  expect_error([&] { object.numbers("l", 2, 3); }, {"l", "numbers from 2 to 3", "[1]"});
  expect_error([&] { object.numbers("i", 0, 3); }, {"i", "array"});
  expect_error([&] { object.choice("s", 0, {"one", "two"}); }, {"s", "one", "two", "four"});
  expect_error([&] { object.object("i"); }, {"recipe.json", "i", "object"});
  expect_error([&] { object.object("o").integer("k", 0, 0, 9); }, {"recipe.json: o.k: expected", "\"v\""});
  expect_error([&] { object.choices("s", {"one"}); }, {"recipe.json: s", "array", "\"one\"", "\"four\""});
  expect_error([&] { object.choices("l", {"one"}); }, {"recipe.json: l", "array", "\"one\"", "got 1"});
  expect_error([&] { object.choices("absent", {"one"}); }, {"recipe.json: absent: missing", "\"one\""});
  expect_error([&] { object.objects("s"); }, {"recipe.json: s", "array of objects", "\"four\""});
  expect_error([&] { object.objects("l"); }, {"recipe.json: l[0]", "object", "got 1"});
  expect_error([&] { JsonObject(value.at("l"), "list"); }, {"list", "object", "[1]"});
}

TEST(JsonObject, FinishNamesEveryKeyThatNobodyAskedFor) {
  const json value = json::parse(R"({"a": 1, "b": 2, "c": 3})");
  JsonObject object(value, "file");
  object.integer("b", 0, 0, 9);
  expect_error([&] { object.finish(); }, {"file", "\"a\"", "\"c\"", "known are \"b\""});
}

TEST(JsonObject, KeysOfKeysFollowAfterDots) {
  const json value = json::parse(R"({"passes": [null, {"steps": [{"low_rank": {"rank": 0}}]}]})");
  JsonObject pass = JsonObject(value, "recipe.json").objects("passes").at(0);
  EXPECT_EQ(pass.path(), "recipe.json: passes[1]");
  JsonObject low_rank = pass.objects("steps").at(0).object("low_rank");
  expect_error([&] { low_rank.finish(); }, {"recipe.json: passes[1].steps[0].low_rank: unknown key \"rank\""});
  expect_error([&] { low_rank.integer("rank", 0, 1, 9); }, {"recipe.json: passes[1].steps[0].low_rank.rank: expected"});
}

TEST(ReadJsonFile, NamesTheFileAndThePosition) {
  const test::TempDirectory directory;
  test::write_bytes(directory / "bad.json", "{\n  \"a\": 1,\n  oops\n}");
  expect_error([&] { read_json_file((directory / "bad.json").string()); }, {"bad.json", "line 3"});
  expect_error([&] { read_json_file((directory / "none.json").string()); }, {"none.json", "cannot be opened"});
  test::write_bytes(directory / "good.json", "{\"a\": [1, 2]}");
  EXPECT_EQ(read_json_file((directory / "good.json").string()), json::parse("{\"a\": [1, 2]}"));
}

}  // namespace
}  // namespace baseq

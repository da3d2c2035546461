#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <random>

#include "baseq/io/checkpoint.h"
#include "temp_directory.h"

namespace baseq {
namespace {

using test::error_of;
using test::read_bytes;
using test::TempDirectory;
using test::write_bytes;

std::string length_bytes(uint64_t length) {
  std::string bytes(8, '\0');
  std::memcpy(bytes.data(), &length, 8);
  return bytes;
}

class SafetensorsHostile : public ::testing::Test {
 protected:
  // Opens a file of these bytes and reads every tensor; returns the error message, "" for none.
  std::string open_bytes(std::string_view bytes) {
    write_bytes(path_, bytes);
    return error_of([&] {
      const SafetensorsFile file(path_);
      for (const std::string& name : file.names()) {
        file.tensor(name).clone();
      }
    });
  }
  void expect_refused(const std::string& header, size_t num_data_bytes, const std::string& reason) {
    SCOPED_TRACE(header.substr(0, 300));
    const std::string message = open_bytes(length_bytes(header.size()) + header + std::string(num_data_bytes, '\0'));
    EXPECT_NE(message.find(path_.string()), message.npos) << message;
    EXPECT_NE(message.find(reason), message.npos) << message << "\n  lacks: " << reason;
  }
  std::string small_file() {
    save_safetensors(
        path_, {{"a", at::arange(3, at::kFloat)}, {"b", at::ones({2}, at::kBool)}, {"c", at::ones({1}, at::kLong)}},
        {{"k", "v"}});
    return read_bytes(path_);
  }
  TempDirectory dir_;
  std::filesystem::path path_ = dir_ / "x.safetensors";
};

TEST_F(SafetensorsHostile, TruncationAtEveryLengthIsRefused) {
  const std::string bytes = small_file();
  ASSERT_EQ(open_bytes(bytes), "");
  for (size_t length = 0; length < bytes.size(); ++length) {
    const std::string message = open_bytes(std::string_view(bytes).substr(0, length));
    EXPECT_NE(message.find("incomplete download?"), message.npos) << length << ": " << message;
  }
  EXPECT_NE(open_bytes(bytes + "x").find("the data section ends at"), std::string::npos);
}

TEST_F(SafetensorsHostile, ChangedBytesAreRefusedOrLoad) {
  const std::string bytes = small_file();
  std::mt19937 random(7);
  int num_loaded = 0, num_refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string changed = bytes;
    const int num_changes = 1 + static_cast<int>(random() % 4);
    for (int i = 0; i < num_changes; ++i) {
      changed[random() % changed.size()] = static_cast<char>(random());
    }
    ++(open_bytes(changed).empty() ? num_loaded : num_refused);
  }
  EXPECT_GT(num_loaded, 0);
  EXPECT_GT(num_refused, 1000);
}

TEST_F(SafetensorsHostile, EveryFlippedBitIsRefusedOrLoads) {
  const std::string bytes = small_file();
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    std::string changed = bytes;
    changed[bit / 8] = static_cast<char>(changed[bit / 8] ^ (1 << (bit % 8)));
    const std::string message = open_bytes(changed);
    EXPECT_TRUE(message.empty() || message.find(path_.string()) != message.npos) << message;
  }
}

TEST_F(SafetensorsHostile, AGitLfsPointerIsNamed) {
  const std::string message = open_bytes("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n");
  EXPECT_NE(message.find("git lfs pull"), std::string::npos) << message;
}

TEST_F(SafetensorsHostile, ImpossibleHeaderLengthsAreRefused) {
  EXPECT_NE(open_bytes(length_bytes(100'000'001) + "{}").find("expected at most 100000000"), std::string::npos);
  EXPECT_NE(open_bytes(length_bytes(UINT64_MAX) + "{}").find("expected at most 100000000"), std::string::npos);
  EXPECT_NE(open_bytes(length_bytes(3) + "{}").find("too few for its header"), std::string::npos);
  EXPECT_NE(open_bytes(length_bytes(0)).find("does not begin with '{'"), std::string::npos);
}

TEST_F(SafetensorsHostile, HeadersThatAreNotStrictJsonObjectsAreRefused) {
  using namespace std::string_literals;
  expect_refused("[]", 0, "does not begin with '{'");
  expect_refused(" {}", 0, "does not begin with '{'");
  expect_refused("\xef\xbb\xbf{}", 0, "does not begin with '{'");
  expect_refused("{", 0, "is not valid JSON: parse error at line 1, column 2");
  expect_refused("{} x", 0, "is not valid JSON");
  expect_refused("{}\0garbage"s, 0, "NUL byte at position 2");
  expect_refused("{\"\xff\":1}", 0, "ill-formed UTF-8 byte");
  expect_refused("{\"\\ud800\":1}", 0, "is not valid JSON");
  expect_refused("{\"a\":1e999}", 0, "is not valid JSON: number overflow");
  expect_refused("{\"a\":" + std::string(1000000, '['), 0, "nests deeper than 64 levels");
  std::string objects;
  for (int i = 0; i < 100000; ++i) {
    objects += "{\"a\":";
  }
  expect_refused(objects, 0, "nests deeper than 64 levels");
}

TEST_F(SafetensorsHostile, DuplicateKeysAreRefused) {
  const std::string a = R"("a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]})";
  expect_refused("{" + a + "," + a + "}", 1, "has the key \"a\" twice");
  expect_refused("{" + a + R"(,"\u0061":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}})", 1,
                 "has the key \"a\" twice");
  expect_refused(R"({"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}})", 1, "has the key \"dtype\"");
  expect_refused(R"({"__metadata__":{"x":"1","x":"2"}})", 0, "has the key \"x\" twice");
}

TEST_F(SafetensorsHostile, MetadataMustMapStringsToStrings) {
  expect_refused(R"({"__metadata__":[]})", 0, "__metadata__ that is not an object");
  expect_refused(R"({"__metadata__":null})", 0, "__metadata__ that is not an object");
  expect_refused(R"({"__metadata__":{"x":1}})", 0, "__metadata__ entry \"x\" that is not a string");
}

TEST_F(SafetensorsHostile, MisdescribedTensorsAreRefused) {
  const auto tensor = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"a":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}";
  };
  expect_refused(R"({"a":[]})", 0, "tensor \"a\" is described by something that is not an object");
  expect_refused(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", 1, "tensor \"a\" has no dtype");
  expect_refused(R"({"a":{"dtype":"U8","data_offsets":[0,1]}})", 1, "tensor \"a\" has no shape");
  expect_refused(R"({"a":{"dtype":"U8","shape":[1]}})", 1, "tensor \"a\" has no data_offsets");
  expect_refused(tensor("8", "[1]", "[0,1]"), 1, "dtype that is not a string");
  expect_refused(tensor("\"F8_E4M3\"", "[1]", "[0,1]"), 1, "has dtype \"F8_E4M3\", expected one of F64 F32");
  expect_refused(tensor("\"f32\"", "[1]", "[0,4]"), 4, "has dtype \"f32\"");
  expect_refused(tensor("\"U8\"", "1", "[0,1]"), 1, "a shape that is not a list");
  for (const char* size : {"-1", "1.0", "1e0", "\"1\"", "true", "null", "[1]", "9223372036854775808",
                           "18446744073709551615", "18446744073709551617"}) {
    expect_refused(tensor("\"U8\"", std::string("[") + size + "]", "[0,1]"), 1, "not an integer from 0 to 2^63 - 1");
  }
  expect_refused(tensor("\"U8\"", "[1]", "{}"), 1, "data_offsets that is not a list");
  expect_refused(tensor("\"U8\"", "[1]", "[1]"), 1, "has 1 data_offsets, expected 2");
  expect_refused(tensor("\"U8\"", "[1]", "[0,1,1]"), 1, "has 3 data_offsets, expected 2");
  expect_refused(tensor("\"U8\"", "[1]", "[-1,0]"), 1, "not an integer");
  expect_refused(tensor("\"U8\"", "[1]", "[1,0]"), 1, "begin at 1 and end at 0");
  expect_refused(tensor("\"U8\"", "[2]", "[0,2]"), 1, "has only 1 data bytes; incomplete download?");
  expect_refused(tensor("\"F32\"", "[2]", "[0,4]"), 4, "hold 4 bytes but its shape and dtype take 8");
  expect_refused(tensor("\"U8\"", "[0]", "[0,1]"), 1, "hold 1 bytes but its shape and dtype take 0");
}

TEST_F(SafetensorsHostile, ShapesWhoseSizeOverflowsAreRefused) {
  for (const char* shape :
       {"[4611686018427387904,4611686018427387904]", "[4294967296,4294967296]", "[2305843009213693952]",
        "[9223372036854775807]", "[0,4611686018427387904,4611686018427387904]", "[9223372036854775807,0,2]"}) {
    expect_refused(std::string(R"({"a":{"dtype":"F32","shape":)") + shape + R"(,"data_offsets":[0,0]}})", 0,
                   "overflows 64 bits");
  }
  // Large but representable, and empty: legal.
  const std::string header = R"({"a":{"dtype":"F32","shape":[0,1099511627776],"data_offsets":[0,0]}})";
  EXPECT_EQ(open_bytes(length_bytes(header.size()) + header), "");
}

TEST_F(SafetensorsHostile, HolesAndOverlapsAreRefused) {
  const auto two = [](const std::string& a, const std::string& b, int size_b) {
    return R"({"a":{"dtype":"U8","shape":[4],"data_offsets":)" + a + R"(},"b":{"dtype":"U8","shape":[)" +
           std::to_string(size_b) + R"(],"data_offsets":)" + b + "}}";
  };
  expect_refused(two("[0,4]", "[2,6]", 4), 6, "\"b\" begins at data byte 2 and overlaps");
  expect_refused(two("[0,4]", "[0,4]", 4), 4, "overlaps");
  expect_refused(two("[0,4]", "[2,2]", 0), 4, "\"b\" begins at data byte 2 and overlaps");
  expect_refused(two("[0,4]", "[5,9]", 4), 9, "data bytes 4 to 5 before tensor \"b\" belong to no tensor");
  expect_refused(two("[1,5]", "[5,9]", 4), 9, "data bytes 0 to 1 before tensor \"a\" belong to no tensor");
  expect_refused(two("[0,4]", "[4,8]", 4), 9, "the data section ends at 9");
  expect_refused("{}", 1, "the data section ends at 1");
  // Tensors in any order, empty ones at a border: legal.
  for (const std::string& header : {two("[4,8]", "[0,4]", 4), two("[0,4]", "[0,0]", 0), two("[0,4]", "[4,4]", 0)}) {
    const size_t size = header.find("[4,8]") != header.npos ? 8 : 4;
    EXPECT_EQ(open_bytes(length_bytes(header.size()) + header + std::string(size, 'x')), "") << header;
  }
}

TEST_F(SafetensorsHostile, BytesThatAreNoBooleansAreRefused) {
  const std::string header = R"({"a":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}})";
  EXPECT_EQ(open_bytes(length_bytes(header.size()) + header + std::string("\0\1\0", 3)), "");
  EXPECT_NE(
      open_bytes(length_bytes(header.size()) + header + std::string("\0\1\2", 3)).find("bytes other than 0 and 1"),
      std::string::npos);
}

TEST_F(SafetensorsHostile, HostileNamesAreEscapedInMessages) {
  expect_refused(R"({"\u001b[2J\u0000\n":1})", 0, R"(tensor "\u001b[2J\u0000\n" is)");
  expect_refused("{\"" + std::string(100000, 'n') + "\":1}", 0, std::string(200, 'n') + "...\"");
}

TEST_F(SafetensorsHostile, WhatIsNoRegularFileIsRefused) {
  EXPECT_NE(error_of([&] { SafetensorsFile file(dir_.path()); }).find("is not a regular file"), std::string::npos);
  EXPECT_NE(error_of([&] { SafetensorsFile file("/dev/zero"); }).find("is not a regular file"), std::string::npos);
  ASSERT_EQ(mkfifo((dir_ / "pipe").c_str(), 0600), 0);
  EXPECT_NE(error_of([&] { SafetensorsFile file(dir_ / "pipe"); }).find("is not a regular file"), std::string::npos);
  EXPECT_NE(error_of([&] { SafetensorsFile file(dir_ / "absent"); }).find("No such file"), std::string::npos);
}

}  // namespace
}  // namespace baseq

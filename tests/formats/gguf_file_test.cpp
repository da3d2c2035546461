#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "../io/temp_directory.h"
#include "formats/gguf/file.h"

namespace baseq {
namespace {

using test::error_of;
using test::expect_error;

/// A file put together value by value, as the specification says.
class Bytes {
 public:
  template <class T>
  Bytes& put(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  Bytes& text(const std::string& value) {
    put(uint64_t{value.size()});
    bytes_ += value;
    return *this;
  }
  Bytes& header(uint64_t num_tensors, uint64_t num_pairs, uint32_t version = 3) {
    bytes_ += "GGUF";
    return put(version).put(num_tensors).put(num_pairs);
  }
  Bytes& tensor(const std::string& name, const std::vector<uint64_t>& fastest_first, uint32_t type, uint64_t offset) {
    text(name).put(static_cast<uint32_t>(fastest_first.size()));
    for (const uint64_t size : fastest_first) put(size);
    return put(type).put(offset);
  }
  Bytes& pad(size_t alignment = 32) {
    bytes_.resize((bytes_.size() + alignment - 1) / alignment * alignment);
    return *this;
  }
  const std::string& get() const { return bytes_; }

 private:
  std::string bytes_;
};

GgufFile open(const std::string& bytes) {
  // On the heap and of exactly that size: the sanitizer sees a read past the end.
  std::shared_ptr<char[]> copy(new char[bytes.size()]);
  std::memcpy(copy.get(), bytes.data(), bytes.size());
  return GgufFile(std::shared_ptr<const void>(copy, copy.get()), bytes.size(), "x.gguf");
}

std::string small_file() {
  Bytes bytes;
  bytes.header(2, 4);
  bytes.text("number").put(uint32_t{4}).put(uint32_t{7});
  bytes.text("text").put(uint32_t{8}).text("value");
  bytes.text("flags").put(uint32_t{9}).put(uint32_t{7}).put(uint64_t{2}).put(uint8_t{0}).put(uint8_t{1});
  bytes.text("names").put(uint32_t{9}).put(uint32_t{8}).put(uint64_t{2}).text("a").text("bc");
  bytes.tensor("matrix", {3, 2}, 0, 0).tensor("vector", {4}, 1, 32).pad();
  for (int i = 0; i < 6; ++i) bytes.put(static_cast<float>(i));
  bytes.pad();
  for (int i = 0; i < 4; ++i) bytes.put(static_cast<uint16_t>(0x3c00));
  return bytes.get();
}

TEST(GgufFile, ReadsMetadataAndTensors) {
  const GgufFile file = open(small_file());
  EXPECT_EQ(file.metadata(),
            nlohmann::json({{"number", 7}, {"text", "value"}, {"flags", {false, true}}, {"names", {"a", "bc"}}}));
  EXPECT_EQ(file.tensors().at("matrix").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(file.tensors().at("vector").type, 1U);
  EXPECT_TRUE(at::equal(file.bytes("matrix", 24).clone().view(at::kFloat), at::arange(6, at::kFloat)));
  EXPECT_TRUE(at::equal(file.bytes("vector", 8).clone().view(at::kHalf), at::ones({4}, at::kHalf)));
  expect_error([&] { file.bytes("vector", 9); }, {"x.gguf", "vector", "9 bytes"});
  expect_error([&] { file.bytes("other", 1); }, {"x.gguf", "other"});
}

TEST(GgufFile, TensorOutlivesTheFile) {
  Tensor bytes;
  {
    const GgufFile file = open(small_file());
    bytes = file.bytes("matrix", 24);
  }
  EXPECT_EQ(bytes.clone().view(at::kFloat).sum().item<float>(), 15);
}

TEST(GgufFile, TensorsOfAMappedFileComeBackAfterItsPagesWereReleased) {
  const test::TempDirectory directory;
  test::write_bytes(directory / "x.gguf", small_file());
  const GgufFile file(directory / "x.gguf"), in_memory = open(small_file());
  const std::string name = file.tensors().begin()->first;
  const Tensor mapped = file.bytes(name, 4), held = in_memory.bytes(name, 4);
  file.release_pages();
  in_memory.release_pages();
  EXPECT_TRUE(at::equal(mapped, held));
}

TEST(GgufFile, TruncationAtEveryLengthIsRefused) {
  const std::string bytes = small_file();
  for (size_t length = 0; length < bytes.size(); ++length) {
    const std::string message = error_of([&] {
      const GgufFile file = open(bytes.substr(0, length));
      file.bytes("matrix", 24);
      file.bytes("vector", 8);
    });
    EXPECT_NE(message.find("x.gguf"), message.npos) << length << ": " << message;
  }
}

TEST(GgufFile, ChangedBytesAreRefusedOrLoad) {
  const std::string bytes = small_file();
  std::mt19937 random(7);
  int num_loaded = 0, num_refused = 0;
  for (int round = 0; round < 5000; ++round) {
    std::string changed = bytes;
    const int num_changes = 1 + static_cast<int>(random() % 4);
    for (int i = 0; i < num_changes; ++i) changed[random() % changed.size()] = static_cast<char>(random());
    const std::string message = error_of([&] {
      const GgufFile file = open(changed);
      for (const auto& [name, entry] : file.tensors()) file.bytes(name, 8).clone();
    });
    ++(message.empty() ? num_loaded : num_refused);
  }
  EXPECT_GT(num_loaded, 0);
  EXPECT_GT(num_refused, 1000);
}

TEST(GgufFile, SizesThatNoFileCanHoldAreRefusedBeforeMemoryIsTaken) {
  constexpr uint64_t kHuge = uint64_t{1} << 62;
  const auto refused = [](const Bytes& bytes, const std::string& reason) {
    expect_error([&] { open(bytes.get()); }, {"x.gguf", reason});
  };
  refused(Bytes().header(0, 0, 1), "version 1");
  refused(Bytes().header(0, kHuge), "ends inside its header");
  refused(Bytes().header(kHuge, 0), "ends inside its header");
  refused(Bytes().header(0, 1).put(kHuge).put(uint64_t{0}), "ends inside its header");
  refused(Bytes().header(0, 1).text("k").put(uint32_t{8}).put(kHuge), "ends inside its header");
  refused(Bytes().header(0, 1).text("k").put(uint32_t{9}).put(uint32_t{0}).put(kHuge), "ends inside its header");
  refused(Bytes().header(0, 1).text("k").put(uint32_t{13}), "no type of a metadata value");
  refused(Bytes().header(0, 2).text("k").put(uint32_t{7}).put(uint8_t{1}).text("k").put(uint32_t{7}).put(uint8_t{1}),
          "twice");
  refused(Bytes().header(1, 0).tensor("t", {kHuge, kHuge}, 0, 0).pad(), "no file can hold");
  refused(Bytes().header(1, 0).tensor("t", {uint64_t{1} << 60}, 0, 0).pad(), "no file can hold");
  refused(Bytes().header(1, 0).tensor("t", {0}, 0, 0).pad(), "no file can hold");
  refused(Bytes().header(1, 0).tensor("t", {1, 1, 1, 1, 1}, 0, 0).pad(), "5 dimensions");
  refused(Bytes().header(1, 0).tensor("t", {1}, 0, 7).pad(), "multiple of 32");
  refused(Bytes().header(1, 0).tensor("t", {1}, 0, ~uint64_t{31}).pad(), "behind the end");
  refused(Bytes().header(2, 0).tensor("t", {1}, 0, 0).tensor("t", {1}, 0, 0).pad(), "twice");
  Bytes nested;
  nested.header(0, 1).text("k").put(uint32_t{9});
  for (int i = 0; i < 100; ++i) nested.put(uint32_t{9}).put(uint64_t{1});
  refused(nested, "nested deeper");
  refused(Bytes().header(0, 1).text("general.alignment").put(uint32_t{4}).put(uint32_t{3}), "power of two");
}

TEST(GgufFile, MetadataAreNotAllowedManyTimesTheMemoryOfTheirText) {
  // A byte becomes a value of 16 bytes, an empty text of 8 one of 48, and a tensor of 32 an entry of 200.
  constexpr uint64_t kBytes = 16 << 20;
  Bytes bytes;
  bytes.header(0, 1).text("k").put(uint32_t{9}).put(uint32_t{0}).put(kBytes);
  expect_error([&] { open(bytes.get() + std::string(kBytes, '\1')); },
               {"the header of x.gguf takes more than 224 MiB of memory"});
  Bytes texts;
  texts.header(0, 1).text("k").put(uint32_t{9}).put(uint32_t{8}).put(kBytes / 4);
  expect_error([&] { open(texts.get() + std::string(8 * kBytes / 4, '\0')); }, {"takes more than 224 MiB"});
  Bytes tensors;
  constexpr uint64_t kTensors = 1'200'000;
  tensors.header(kTensors, 0);
  for (uint64_t i = 0; i < kTensors; ++i) tensors.tensor(std::to_string(i), {1}, 0, 0);
  expect_error([&] { open(tensors.get()); }, {"takes more than 224 MiB"});
}

TEST(GgufFile, AGitLfsPointerIsNamed) {
  expect_error([] { open("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"); },
               {"x.gguf", "git-lfs pointer", "git lfs pull"});
}

}  // namespace
}  // namespace baseq

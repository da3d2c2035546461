#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <chrono>
#include <cstring>
#include <optional>

#include "baseq/io/checkpoint.h"
#include "temp_directory.h"

namespace baseq {
namespace {

using test::error_of;
using test::expect_error;
using test::list;
using test::read_bytes;
using test::TempDirectory;
using test::write_bytes;

std::string file_of(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return file + header + data;
}

// Same dtype, shape and bytes; unlike equal() it tells NaNs and zeros apart.
void expect_same_bytes(const Tensor& got, const Tensor& expected) {
  ASSERT_EQ(got.scalar_type(), expected.scalar_type());
  ASSERT_EQ(got.sizes(), expected.sizes());
  const Tensor a = got.contiguous(), b = expected.contiguous();
  if (a.nbytes() > 0) {
    EXPECT_EQ(std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()), 0);
  }
}

TEST(Safetensors, EveryDTypeComesBackBitForBit) {
  const TempDirectory dir;
  const auto float32 = at::tensor({0.0F, -0.0F, 1.5F, -2.25F, INFINITY, NAN, 1e-40F});
  std::map<std::string, Tensor> tensors = {
      {"f64", at::tensor({1e300, -0.1})},
      {"f32", float32},
      {"f16", float32.to(at::kHalf)},
      {"bf16", float32.to(at::kBFloat16)},
      {"i64", at::tensor({INT64_MIN, INT64_MAX}, at::kLong)},
      {"i32", at::tensor({INT32_MIN, INT32_MAX}, at::kInt)},
      {"i16", at::tensor({-32768, 32767}, at::kInt).to(at::kShort)},
      {"i8", at::tensor({-128, 127, 3}, at::kInt).to(at::kChar)},
      {"u8", at::arange(256, at::kInt).to(at::kByte)},
      {"bool", at::tensor({1, 0, 1}, at::kInt).to(at::kBool)},
      {"scalar", at::scalar_tensor(3.5)},
      {"empty", at::empty({3, 0, 5}, at::kHalf)},
      {"no elements", at::empty({0}, at::kLong)},
  };
  save_safetensors(dir / "x.safetensors", tensors, {{"format", "pt"}, {"note", "umlaut \xc3\xbc, quote \""}});
  const SafetensorsFile file(dir / "x.safetensors");
  std::vector<std::string> names;
  for (const auto& [name, tensor] : tensors) {
    SCOPED_TRACE(name);
    names.push_back(name);
    ASSERT_TRUE(file.contains(name));
    expect_same_bytes(file.tensor(name), tensor);
  }
  EXPECT_EQ(file.names(), names);
  EXPECT_FALSE(file.contains("f6"));
  EXPECT_EQ(file.metadata(),
            (std::map<std::string, std::string>{{"format", "pt"}, {"note", "umlaut \xc3\xbc, quote \""}}));
  EXPECT_EQ(list(dir.path()), std::vector<std::string>{"x.safetensors"});
}

TEST(Safetensors, TensorOutlivesItsFile) {
  const TempDirectory dir;
  const Tensor expected = at::arange(100000, at::kFloat);
  save_safetensors(dir / "x.safetensors", {{"a", expected}});
  std::optional<SafetensorsFile> file(dir / "x.safetensors");
  const Tensor view = file->tensor("a").slice(0, 10);
  file.reset();
  std::filesystem::remove(dir / "x.safetensors");
  EXPECT_TRUE(at::equal(view, expected.slice(0, 10)));
}

TEST(Safetensors, TensorsAreViewsOfOneMapping) {
  const TempDirectory dir;
  save_safetensors(dir / "x.safetensors", {{"a", at::ones({64})}});
  const SafetensorsFile file(dir / "x.safetensors");
  EXPECT_EQ(file.tensor("a").const_data_ptr(), file.tensor("a").const_data_ptr());
}

TEST(Safetensors, TensorsOutliveTheRelease) {
  const TempDirectory dir;
  const Tensor expected = at::arange(100000, at::kFloat);
  save_safetensors(dir / "x.safetensors", {{"a", expected}});
  const SafetensorsFile file(dir / "x.safetensors");
  const Tensor view = file.tensor("a");
  EXPECT_TRUE(at::equal(view, expected));
  file.release_pages();
  EXPECT_TRUE(at::equal(view, expected));
  EXPECT_EQ(file.info("a").dtype, at::kFloat);
  EXPECT_EQ(file.info("a").shape, std::vector<int64_t>{100000});
  expect_error([&] { file.info("b"); }, {"has no tensor \"b\""});
}

TEST(Safetensors, SavingOverTheFileThatTensorsAreViewsOfIsSafe) {
  const TempDirectory dir;
  save_safetensors(dir / "x.safetensors", {{"a", at::arange(5000, at::kFloat)}});
  const Tensor old = SafetensorsFile(dir / "x.safetensors").tensor("a");
  save_safetensors(dir / "x.safetensors", {{"a", old * 2}, {"b", old}});
  EXPECT_TRUE(at::equal(old, at::arange(5000, at::kFloat)));
  EXPECT_TRUE(at::equal(SafetensorsFile(dir / "x.safetensors").tensor("a"), old * 2));
  EXPECT_TRUE(at::equal(SafetensorsFile(dir / "x.safetensors").tensor("b"), old));
}

// The bytes that the Python package safetensors 0.8.0 writes for the same tensors.
TEST(Safetensors, WritesTheBytesOfTheReferenceImplementation) {
  const TempDirectory dir;
  const std::map<std::string, Tensor> tensors = {{"b", at::tensor({1, 2, 3}, at::kInt).to(at::kByte)},
                                                 {"a", at::tensor({1.5F, -2.0F}).view({1, 2})},
                                                 {"\xc3\xa9\"", at::scalar_tensor(7, at::kLong)}};
  save_safetensors(dir / "x.safetensors", tensors);
  using namespace std::string_literals;
  EXPECT_EQ(read_bytes(dir / "x.safetensors"),
            "\xc8\0\0\0\0\0\0\0"s
            "{\"__metadata__\":{\"format\":\"pt\"},\"\xc3\xa9\\\"\":{\"dtype\":\"I64\",\"shape\":[],"
            "\"data_offsets\":[0,8]},\"a\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[8,16]},"
            "\"b\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[16,19]}}   "
            "\7\0\0\0\0\0\0\0\0\0\xc0\x3f\0\0\0\xc0\1\2\3"s);
}

TEST(SafetensorsWriter, PiecesGiveTheBytesOfWholeTensors) {
  const TempDirectory dir;
  const Tensor ids = at::arange(6, at::kLong).view({2, 3}), values = at::arange(24, at::kFloat).view({6, 4});
  const Tensor none = at::empty({0, 3}, at::kChar);
  save_safetensors(dir / "whole.safetensors", {{"ids", ids}, {"values", values}, {"none", none}});
  SafetensorsWriter file(
      dir / "pieces.safetensors",
      {{"ids", {at::kLong, {2, 3}}}, {"values", {at::kFloat, {6, 4}}}, {"none", {at::kChar, {0, 3}}}});
  ASSERT_EQ(file.order(), (std::vector<std::string>{"ids", "values", "none"}));
  file.append("ids", ids);
  for (int64_t row = 0; row < 6; row += 2) file.append("values", values.narrow(0, row, 2));
  file.append("none", none);
  EXPECT_FALSE(std::filesystem::exists(dir / "pieces.safetensors"));
  file.commit();
  EXPECT_EQ(read_bytes(dir / "pieces.safetensors"), read_bytes(dir / "whole.safetensors"));
}

TEST(SafetensorsWriter, PiecesThatAreNotTheTensorAreRefused) {
  const TempDirectory dir;
  {
    SafetensorsWriter file(dir / "x.safetensors", {{"a", {at::kLong, {2}}}, {"b", {at::kFloat, {2}}}});
    expect_error([&] { file.append("b", at::ones({2})); }, {"\"b\"", "out of order"});
    expect_error([&] { file.append("a", at::ones({2})); }, {"\"a\"", "F32"});
    file.append("a", at::ones({1}, at::kLong));
    expect_error([&] { file.append("a", at::ones({2}, at::kLong)); }, {"\"a\"", "8 bytes"});
    expect_error([&] { file.commit(); }, {"\"a\"", "not complete"});
  }
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(Safetensors, AFileWithoutTensorsOrMetadataIsLegal) {
  const TempDirectory dir;
  save_safetensors(dir / "x.safetensors", {}, {});
  EXPECT_EQ(read_bytes(dir / "x.safetensors"), file_of("{}      ", ""));
  EXPECT_TRUE(SafetensorsFile(dir / "x.safetensors").names().empty());
}

TEST(Safetensors, SavesWhatIsNotContiguousOrNeedsGradients) {
  const TempDirectory dir;
  const Tensor a = at::arange(12, at::kFloat).view({3, 4});
  const Tensor learned = at::ones({3}).requires_grad_();
  const Tensor negative = at::_neg_view(a);
  save_safetensors(dir / "x.safetensors",
                   {{"t", a.t()}, {"step", a.slice(1, 0, 4, 2)}, {"learned", learned * 2}, {"negative", negative}});
  const SafetensorsFile file(dir / "x.safetensors");
  EXPECT_TRUE(at::equal(file.tensor("t"), a.t()));
  EXPECT_TRUE(at::equal(file.tensor("step"), a.slice(1, 0, 4, 2)));
  EXPECT_TRUE(at::equal(file.tensor("learned"), at::full({3}, 2.0)));
  EXPECT_TRUE(at::equal(file.tensor("negative"), -a));
}

TEST(Safetensors, ReadsUnalignedTensors) {
  const TempDirectory dir;
  const double values[] = {1.25, -7};
  std::string data = "\x05";
  data.append(reinterpret_cast<const char*>(values), sizeof(values));
  write_bytes(dir / "x.safetensors", file_of(R"({"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                             R"("f":{"dtype":"F64","shape":[2],"data_offsets":[1,17]}})",
                                             data));
  const Tensor f = SafetensorsFile(dir / "x.safetensors").tensor("f");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(f.const_data_ptr()) % 8, 0U);
  EXPECT_TRUE(at::equal(f, at::tensor({1.25, -7.0})));
}

TEST(Safetensors, RefusesToSaveWhatItCouldNotRead) {
  const TempDirectory dir;
  const auto save = [&](const std::string& name, const Tensor& tensor) {
    return [&, name, tensor] { save_safetensors(dir / "x.safetensors", {{name, tensor}}); };
  };
  const Tensor ok = at::ones({2});
  expect_error(save("a", Tensor()), {"tensor \"a\" is undefined"});
  expect_error(save("a", at::ones({2}, at::kComplexFloat)), {"tensor \"a\" has dtype ComplexFloat"});
  expect_error(save("a", at::ones({2, 2}).to_sparse()), {"tensor \"a\" has layout Sparse"});
  expect_error(save("__metadata__", ok), {"cannot be named __metadata__"});
  expect_error(save("\xff", ok), {"the tensor name", "invalid UTF-8"});
  expect_error(
      [&] {
        save_safetensors(dir / "x.safetensors", {{"a", ok}}, {{"k", "\xc3"}});
      },
      {"the metadata", "UTF-8"});
  expect_error(
      [&] {
        save_safetensors(dir / "no/x.safetensors", {{"a", ok}});
      },
      {"cannot create", "no/x.safetensors.baseq.tmp", "No such file"});
  EXPECT_TRUE(list(dir.path()).empty());
}

TEST(Safetensors, AFullDiskIsAnErrorAndLeavesTheOldFile) {
  const TempDirectory dir;
  save_safetensors(dir / "x.safetensors", {{"a", at::ones({2})}});
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  rlimit small = old;
  small.rlim_cur = 100000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string message = error_of([&] { save_safetensors(dir / "x.safetensors", {{"a", at::zeros({200000})}}); });
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  signal(SIGXFSZ, old_handler);
  EXPECT_NE(message.find("cannot write"), message.npos) << message;
  EXPECT_EQ(list(dir.path()), std::vector<std::string>{"x.safetensors"});
  EXPECT_TRUE(at::equal(SafetensorsFile(dir / "x.safetensors").tensor("a"), at::ones({2})));
}

// A header parser that walks all tensors for each tensor takes 19 s here, a linear one less than 0.2 s.
TEST(Safetensors, OpensManyTensorsInLinearTime) {
  const TempDirectory dir;
  std::map<std::string, Tensor> tensors;
  for (int i = 0; i < 20000; ++i) {
    tensors[c10::str("model.layers.", i, ".self_attn.q_proj.weight_packed")] = at::ones({1});
  }
  save_safetensors(dir / "x.safetensors", tensors);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(SafetensorsFile(dir / "x.safetensors").names().size(), 20000U);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST(Safetensors, AMissingTensorIsNamedWithItsFile) {
  const TempDirectory dir;
  save_safetensors(dir / "x.safetensors", {{"a", at::ones({2})}});
  const SafetensorsFile file(dir / "x.safetensors");
  expect_error([&] { file.tensor("model.norm\n"); }, {(dir / "x.safetensors").string(), R"("model.norm\n")"});
}

}  // namespace
}  // namespace baseq

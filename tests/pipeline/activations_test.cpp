#include "pipeline/activations.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <functional>

#include "../tiny_model.h"

namespace {

/// Called when space for a file is reserved, which can take minutes.
std::function<void()> on_reserving;

}  // namespace

// The library's calls come here: a program's own functions go before those of the C library.
extern "C" int posix_fallocate(int descriptor, off_t offset, off_t size) {
  if (on_reserving) on_reserving();
  return ::syscall(SYS_fallocate, descriptor, 0, offset, size) == 0 ? 0 : errno;
}

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;
using test::TinyShape;

TEST(ActivationStorage, MappedFilesHoldTensorsAndHaveNoName) {
  const TempDirectory directory;
  const Tensor values = test::random_normal({3, 700, 16}, 1, at::kFloat);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Tensor mapped = ActivationStorage{.dtype = dtype, .directory = directory.path()}.allocate(values.sizes());
    EXPECT_TRUE(test::list(directory.path()).empty());
    EXPECT_EQ(mapped.scalar_type(), dtype);
    mapped.copy_(values);
    EXPECT_TRUE(at::equal(mapped, values.to(dtype)));
  }
}

TEST(ActivationStorage, AProcessThatIsKilledLeavesNoFile) {
  const TempDirectory directory;
  int reserved = 0;
  on_reserving = [&] {
    ++reserved;
    EXPECT_TRUE(test::list(directory.path()).empty());
  };
  (void)ActivationStorage{.directory = directory.path()}.allocate({100, 100});
  on_reserving = {};
  EXPECT_EQ(reserved, 1);
}

TEST(ActivationStorage, RefusesWhatItCannotHold) {
  const TempDirectory directory;
  expect_error([&] { ActivationStorage{.directory = directory / "absent"}.allocate({4}); }, {"create", "absent"});
  expect_error([&] { ActivationStorage{.dtype = at::kHalf}.allocate({4}); }, {"dtype", "Half"});
  // More than any file system has.
  expect_error([&] { ActivationStorage{.directory = directory.path()}.allocate({int64_t{1} << 58}); },
               {"reserve space", directory.path().string()});
  EXPECT_TRUE(test::list(directory.path()).empty());
}

TEST(Advance, InPlaceEqualsOutOfPlace) {
  const TinyShape shape;
  const DecoderLayer layer = test::tiny_layer(shape, 1, at::kFloat);
  const int64_t seq = 600;
  const RotaryEmbedding rope = test::tiny_rope(shape, seq, at::kFloat);
  // More tokens than one batch holds.
  const Tensor stream = test::random_normal({5, seq, shape.hidden_size}, 1, at::kFloat);
  const Tensor result = at::empty_like(stream), in_place = stream.clone();
  advance(layer, stream, result, rope);
  advance(layer, in_place, in_place, rope);
  EXPECT_TRUE(at::equal(in_place, result));
  EXPECT_LT(test::relative_error(result, layer.forward(stream, rope)), 1e-6);
}

}  // namespace
}  // namespace baseq

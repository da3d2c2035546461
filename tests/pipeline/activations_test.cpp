#include "baseq/pipeline/activations.h"

#include <gtest/gtest.h>

#include "../tiny_model.h"

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

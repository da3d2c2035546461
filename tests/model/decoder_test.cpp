#include "baseq/model/decoder.h"

#include <gtest/gtest.h>

#include "../tiny_model.h"

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;
using test::TinyShape;

using Tokens = std::vector<int32_t>;

Tokens random_tokens(int64_t count, int64_t vocab_size, uint64_t seed) {
  const Tensor ids = test::random_ids({count}, vocab_size, seed).to(at::kInt);
  return {ids.const_data_ptr<int32_t>(), ids.const_data_ptr<int32_t>() + count};
}

Tensor as_ids(const Tokens& tokens) { return at::tensor(at::ArrayRef<int32_t>(tokens), at::kInt); }

/// Logits of all tokens, which come `chunk` at a time.
Tensor in_chunks(const Decoder& decoder, KvCache& cache, const Tokens& tokens, size_t chunk) {
  std::vector<Tensor> rows;
  for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
    const std::span piece = std::span(tokens).subspan(begin, std::min(chunk, tokens.size() - begin));
    rows.push_back(decoder.forward(piece, cache, /*all_positions=*/true));
  }
  return at::cat(rows);
}

void expect_chunks_change_nothing(const Model& model, const Tokens& tokens) {
  const Decoder decoder = model.load();
  const Tensor expected = decoder.logits(as_ids(tokens));
  EXPECT_LT(test::relative_error(model.logits(as_ids(tokens).unsqueeze(0))[0], expected), 1e-12);
  for (const size_t chunk : {size_t{1}, size_t{7}, tokens.size()}) {
    KvCache cache = decoder.new_cache(static_cast<int64_t>(tokens.size()));
    EXPECT_LT(test::relative_error(in_chunks(decoder, cache, tokens, chunk), expected), 1e-12) << "chunks of " << chunk;
    EXPECT_EQ(cache.length(), static_cast<int64_t>(tokens.size()));
  }
}

TEST(ResidentModel, LogitsWithACacheAreThoseWithoutForEveryArchitecture) {
  const TempDirectory directory;
  for (const TinyShape& shape : test::tiny_shapes()) {
    SCOPED_TRACE(shape.name);
    test::write_checkpoint(directory / shape.name, shape);
    const Model model(Checkpoint(directory / shape.name), {.dtype = at::kDouble});
    expect_chunks_change_nothing(model, random_tokens(19, shape.vocab_size, 3));
  }
}

TEST(ResidentModel, LogitsWithACacheAreThoseWithoutForEveryRotaryEmbedding) {
  for (const std::string& variant : test::golden_variants()) {
    SCOPED_TRACE(variant);
    const std::filesystem::path directory = test::golden_directory(variant);
    const Model model(Checkpoint(directory), {.dtype = at::kDouble});
    const Tensor ids = SafetensorsFile(directory / "golden.safetensors").tensor("input_ids")[0].to(at::kInt);
    const auto* first = ids.const_data_ptr<int32_t>();
    expect_chunks_change_nothing(model, {first, first + ids.numel()});
  }
}

struct Fixture {
  TempDirectory directory;
  TinyShape shape;
  Model model;
  Decoder decoder;

  explicit Fixture(const TinyShape& tiny = test::family_shapes()[0])
      : shape(tiny), model(written()), decoder(model.load()) {}
  Model written() const {
    test::write_checkpoint(directory / "model", shape);
    return Model(Checkpoint(directory / "model"), {.dtype = at::kDouble});
  }
  Tokens tokens(int64_t count, uint64_t seed) const { return random_tokens(count, shape.vocab_size, seed); }
};

TEST(ResidentModel, SequencesTogetherAreTheSequencesAlone) {
  const Fixture fixture;
  const Tokens prompts[] = {fixture.tokens(9, 1), fixture.tokens(1, 2), fixture.tokens(13, 3)};
  const Tokens more[] = {fixture.tokens(1, 4), fixture.tokens(3, 5), fixture.tokens(1, 6)};
  std::vector<KvCache> caches;
  std::vector<Tensor> last, all;
  for (size_t i = 0; i < 3; ++i) {
    caches.push_back(fixture.decoder.new_cache(20));
    Tokens both = prompts[i];
    both.insert(both.end(), more[i].begin(), more[i].end());
    const Tensor logits = fixture.decoder.logits(as_ids(both));
    last.push_back(logits.narrow(0, static_cast<int64_t>(prompts[i].size()) - 1, 1));
    all.push_back(logits.narrow(0, static_cast<int64_t>(prompts[i].size()), static_cast<int64_t>(more[i].size())));
  }
  KvCache* const pointers[] = {&caches[0], &caches[1], &caches[2]};
  const std::vector<std::span<const int32_t>> first(prompts, prompts + 3), second(more, more + 3);
  EXPECT_LT(test::relative_error(fixture.decoder.forward(first, pointers), at::cat(last)), 1e-12);
  EXPECT_LT(test::relative_error(fixture.decoder.forward(second, pointers, true), at::cat(all)), 1e-12);
  EXPECT_EQ(caches[1].length(), 4);
}

TEST(ResidentModel, ATruncatedCacheContinuesFromWhatIsLeft) {
  const Fixture fixture;
  const Tokens tokens = fixture.tokens(12, 1), other = fixture.tokens(5, 2);
  KvCache cache = fixture.decoder.new_cache(100);
  in_chunks(fixture.decoder, cache, tokens, 4);
  cache.truncate(7);
  Tokens joined(tokens.begin(), tokens.begin() + 7);
  joined.insert(joined.end(), other.begin(), other.end());
  const Tensor expected = fixture.decoder.logits(as_ids(joined)).narrow(0, 7, 5);
  EXPECT_LT(test::relative_error(fixture.decoder.forward(other, cache, true), expected), 1e-12);
  expect_error([&] { cache.truncate(13); }, {"keep 13 of 12 tokens"});
}

TEST(ResidentModel, MemoryOfACacheGrowsWithItsTokens) {
  const Fixture fixture;
  KvCache cache = fixture.decoder.new_cache(100000);
  EXPECT_EQ(cache.bytes(), 0);
  fixture.decoder.forward(fixture.tokens(65, 1), cache);
  const int64_t bytes = cache.bytes();
  const int64_t per_token = 2 * fixture.shape.num_kv_heads * fixture.shape.head_dim * fixture.shape.num_layers * 8;
  EXPECT_GE(bytes, 65 * per_token);
  EXPECT_LE(bytes, 2 * 65 * per_token);
}

TEST(ResidentModel, WhatDoesNotFitLeavesTheCachesAsTheyWere) {
  const Fixture fixture;
  KvCache cache = fixture.decoder.new_cache(8), other = fixture.decoder.new_cache(8);
  const Tokens tokens = fixture.tokens(6, 1), none, wrong{0, 40};
  fixture.decoder.forward(tokens, cache);
  const auto forward = [&](std::vector<std::span<const int32_t>> of, std::vector<KvCache*> caches) {
    fixture.decoder.forward(of, caches);
  };
  expect_error([&] { forward({tokens}, {&cache}); }, {"12 tokens", "room for 8"});
  expect_error([&] { forward({tokens, none}, {&other, &cache}); }, {"sequence 1 has no tokens"});
  expect_error([&] { forward({tokens, tokens}, {&other, &other}); }, {"cache 1", "two sequences"});
  expect_error([&] { forward({tokens}, {&other, &cache}); }, {"1 sequences and 2 caches"});
  expect_error([&] { forward({wrong}, {&other}); }, {"40", "39"});
  expect_error([&] { fixture.decoder.new_cache(0); }, {"capacity of 0"});
  EXPECT_EQ(cache.length(), 6);
  EXPECT_EQ(other.length(), 0);
  const Tokens last = fixture.tokens(2, 2);
  Tokens joined = tokens;
  joined.insert(joined.end(), last.begin(), last.end());
  EXPECT_LT(test::relative_error(fixture.decoder.forward(last, cache, true),
                                 fixture.decoder.logits(as_ids(joined)).narrow(0, 6, 2)),
            1e-12);
}

}  // namespace
}  // namespace baseq

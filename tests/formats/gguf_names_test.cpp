#include <gtest/gtest.h>

#include <set>

#include "../tiny_model.h"
#include "formats/gguf/names.h"

namespace baseq {
namespace {

TEST(GgufNames, EveryTensorOfAModelHasANameThatLeadsBack) {
  const test::TinyShape shape{.bias = true, .tied = false, .architecture = "Qwen3ForCausalLM"};
  std::set<std::string> names;
  for_each_tensor(test::tiny_model_config(shape), [&](const std::string& name, at::IntArrayRef) {
    const std::string theirs = gguf_name(name);
    EXPECT_FALSE(theirs.empty()) << name;
    EXPECT_TRUE(names.insert(theirs).second) << theirs;
    EXPECT_EQ(hugging_face_name(theirs), name);
  });
  EXPECT_EQ(gguf_name("model.layers.11.self_attn.k_norm.weight"), "blk.11.attn_k_norm.weight");
  for (const char* name : {"", "output", "blk.1", "blk.1.", "blk.1.weight", "blk.0.output.weight", "attn_q.weight"}) {
    EXPECT_EQ(hugging_face_name(name), "") << name;
  }
}

TEST(GgufNames, RowsOfQueriesAndKeysComeBackInTheirOrder) {
  const GgufArchitecture &llama = *gguf_architecture_named("llama"), &qwen = *gguf_architecture_named("qwen3");
  EXPECT_EQ(permuted_heads(llama, "self_attn.q_proj", 4, 2), 4);
  EXPECT_EQ(permuted_heads(llama, "self_attn.k_proj", 4, 2), 2);
  EXPECT_EQ(permuted_heads(llama, "self_attn.v_proj", 4, 2), 0);
  EXPECT_EQ(permuted_heads(qwen, "self_attn.q_proj", 4, 2), 0);
  // The halves of a head take turns.
  EXPECT_TRUE(at::equal(permute_rows(at::arange(8), 2), at::tensor({0, 2, 1, 3, 4, 6, 5, 7}, at::kLong)));
  const Tensor rows = at::arange(24 * 3).view({24, 3});
  EXPECT_TRUE(at::equal(unpermute_rows(permute_rows(rows, 3), 3), rows));
  EXPECT_TRUE(at::equal(permute_rows(rows, 0), rows));
}

}  // namespace
}  // namespace baseq

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "../tiny_model.h"
#include "baseq/formats/open_model.h"
#include "formats/compressed_tensors/read.h"
#include "formats/gptq/read.h"
#include "model/quantized_linear.h"

/// Files of other tools, of their own packages or of an independent writer: scripts/make_foreign_goldens.py.
namespace baseq {
namespace {

using nlohmann::json;
using Tensors = std::map<std::string, Tensor>;

const std::filesystem::path kFiles = std::filesystem::path(BASEQ_TEST_DATA) / "foreign";
const std::string kLinear = "model.layers.0.mlp.up_proj";

/// A linear of a file, under the name of one of a tiny model.
struct Case {
  std::string name;
  json quantization;
  Tensors tensors;
  Tensor expected;  ///< float32 [out_features, in_features]

  Checkpoint checkpoint() const {
    json config =
        test::tiny_config({.hidden_size = expected.size(1), .intermediate_size = expected.size(0), .num_layers = 1});
    config["quantization_config"] = quantization;
    Checkpoint::MadeTensors made;
    for (const auto& [part, tensor] : tensors) {
      made[kLinear + part] = {{tensor.scalar_type(), tensor.sizes().vec()}, [tensor = tensor] { return tensor; }};
    }
    return Checkpoint("x", config, std::move(made), 0);
  }
  Tensor weight() const {
    const Checkpoint stored = checkpoint();
    const StoredModel model = is_gptq_or_awq(stored) ? read_gptq(stored) : read_compressed_tensors(stored);
    const LinearFormat& format = model.linears.at(kLinear);
    return read_quantized_weight(model.tensors, kLinear, format).weight;
  }
};

std::vector<Case> cases_of(const char* name) {
  const SafetensorsFile file(kFiles / name);
  std::vector<Case> cases;
  for (const auto& [key, text] : file.metadata()) {
    if (key == "format") continue;
    Case found{key, json::parse(text), {}, file.tensor(key + ".expected")};
    for (const std::string& tensor : file.names()) {
      const std::string prefix = key + ".";
      if (!tensor.starts_with(prefix) || tensor == key + ".expected") continue;
      found.tensors["." + tensor.substr(prefix.size())] = file.tensor(tensor).clone();
    }
    cases.push_back(std::move(found));
  }
  return cases;
}

std::vector<Case> all_cases() {
  std::vector<Case> cases = cases_of("compressed_tensors.safetensors");
  for (Case& found : cases_of("gptq.safetensors")) cases.push_back(std::move(found));
  return cases;
}

TEST(ForeignFiles, EveryPackingStandsForTheWeightsThatItsToolReads) {
  const std::vector<Case> cases = all_cases();
  EXPECT_EQ(cases.size(), 21U + 17U);
  for (const Case& found : cases) {
    SCOPED_TRACE(found.name);
    EXPECT_TRUE(at::equal(found.weight(), found.expected));
  }
}

/// Wrong variants of a tensor, each by its name.
std::map<std::string, Tensor> wrong_variants(const Tensor& tensor) {
  std::map<std::string, Tensor> wrong;
  wrong["no dimension"] = tensor.flatten()[0];
  wrong["no values"] = at::empty({0, tensor.size(-1)}, tensor.options());
  wrong["another dtype"] = tensor.to(tensor.is_floating_point() ? at::kInt : at::kDouble);
  wrong["one dimension more"] = tensor.unsqueeze(0);
  if (tensor.dim() != 2) return wrong;
  wrong["a row less"] = tensor.narrow(0, 0, tensor.size(0) - 1);
  wrong["a row more"] = at::cat({tensor, tensor.narrow(0, 0, 1)});
  wrong["a column less"] = tensor.narrow(1, 0, tensor.size(1) - 1);
  wrong["a column more"] = at::cat({tensor, tensor.narrow(1, 0, 1)}, 1);
  return wrong;
}

TEST(ForeignFiles, TensorsThatDoNotFitAreRefusedByName) {
  for (const Case& found : all_cases()) {
    for (const auto& [part, tensor] : found.tensors) {
      for (const auto& [what, wrong] : wrong_variants(tensor)) {
        SCOPED_TRACE(found.name + part + ": " + what);
        Case changed = found;
        changed.tensors[part] = wrong;
        try {
          // What has no influence may be anything: zero points of symmetric grids, a shape that int8 codes have anyway.
          // Another number of columns is seen by Model, which knows how many there are.
          const Tensor weight = changed.weight();
          EXPECT_TRUE(weight.sizes() != found.expected.sizes() || at::equal(weight, found.expected));
        } catch (const c10::Error& error) {
          const std::string message = error.what_without_backtrace();
          EXPECT_NE(message.find(kLinear), std::string::npos) << message;
          EXPECT_EQ(message.find("INTERNAL ASSERT"), std::string::npos) << message;
        }
      }
    }
  }
}

TEST(ForeignFiles, AMissingTensorIsNamed) {
  for (const Case& found : all_cases()) {
    for (const auto& [part, tensor] : found.tensors) {
      SCOPED_TRACE(found.name + part);
      Case changed = found;
      changed.tensors.erase(part);
      const std::string message = test::error_of([&] {
        EXPECT_TRUE(at::equal(changed.weight(), found.expected));  // of a tensor that has no influence
      });
      EXPECT_TRUE(message.empty() || message.find(kLinear) != std::string::npos) << message;
    }
  }
}

TEST(ForeignFiles, NumbersThatAreNoIndexOrShapeAreRefused) {
  for (const Case& found : all_cases()) {
    const std::vector<std::pair<std::string, int64_t>> wrong = {
        {".g_idx", 99}, {".g_idx", -7}, {".weight_shape", -1}, {".weight_shape", 1 << 30}};
    for (const auto& [part, bad] : wrong) {
      if (!found.tensors.contains(part)) continue;
      SCOPED_TRACE(found.name + part + " " + std::to_string(bad));
      Case changed = found;
      changed.tensors[part] = at::full_like(found.tensors.at(part), bad);
      test::expect_error([&] { changed.weight(); }, {kLinear});
    }
  }
}

/// What a checkpoint's config.json may not say without a refusal.
TEST(ForeignFiles, OtherSchemesAreRefusedByTheirKey) {
  for (const Case& found : all_cases()) {
    SCOPED_TRACE(found.name);
    const bool compressed = found.quantization["quant_method"] == "compressed-tensors";
    const std::vector<std::pair<std::string, json>> changes =
        compressed ? std::vector<std::pair<std::string, json>>{{"/config_groups/group_0/weights/num_bits", 1},
                                                               {"/config_groups/group_0/weights/type", "float"},
                                                               {"/config_groups/group_0/weights/strategy", "block"},
                                                               {"/config_groups/group_0/format", "marlin-24"},
                                                               {"/quantization_status", "frozen"}}
                   : std::vector<std::pair<std::string, json>>{{"/bits", 1}, {"/bits", "4"}, {"/group_size", 0}};
    for (const auto& [pointer, value] : changes) {
      Case changed = found;
      changed.quantization[json::json_pointer(pointer)] = value;
      test::expect_error([&] { changed.weight(); }, {"config.json", "quantization_config"});
    }
  }
}

TEST(ForeignFiles, AGgufTensorOfEveryTypeHasTheValuesOfThePackage) {
  const StoredModel stored = open_model(kFiles / "types.gguf");
  EXPECT_EQ(stored.format, "gguf");
  std::vector<std::string> types;
  for (const auto& [type, bytes] : stored.bytes_by_type) types.push_back(type);
  EXPECT_EQ(types, (std::vector<std::string>{"BF16", "F16", "F32", "Q4_0", "Q4_1", "Q6_K", "Q8_0"}));
  const Model model(stored);
  const SafetensorsFile expected(kFiles / "types.safetensors");
  const DecoderLayer layer = model.layer(0);
  layer.for_each_linear([&](const std::string& name, const Linear& linear) {
    const Tensor values = expected.tensor("model.layers.0." + name + ".weight");
    EXPECT_LT(test::relative_error(linear.weight, values), 1e-6) << name;
    // What has integer codes keeps them.
    EXPECT_EQ(linear.quantized.has_value(), name == "self_attn.q_proj" || name == "self_attn.o_proj") << name;
  });
  EXPECT_TRUE(at::equal(model.embedding(), expected.tensor("model.embed_tokens.weight")));
  EXPECT_TRUE(at::equal(layer.post_attention_layernorm.weight,
                        expected.tensor("model.layers.0.post_attention_layernorm.weight")));
}

/// Opens the file with these bytes and reads everything: a refusal names it.
std::string outcome_of(const std::filesystem::path& path, const std::string& bytes) {
  test::write_bytes(path, bytes);
  return test::error_of([&] {
    const Model model(open_model(path));
    model.layer(0);
    model.embedding();
  });
}

TEST(ForeignFiles, AGgufFileThatIsCutOffIsRefused) {
  const std::string bytes = test::read_bytes(kFiles / "types.gguf");
  const test::TempDirectory directory;
  for (size_t length = 0; length < bytes.size(); length += 1 + length / 16) {
    const std::string message = outcome_of(directory / "x.gguf", bytes.substr(0, length));
    EXPECT_NE(message.find("x.gguf"), std::string::npos) << length << ": " << message;
  }
}

TEST(ForeignFiles, AGgufFileWithChangedHeaderIsRefusedOrReads) {
  const std::string bytes = test::read_bytes(kFiles / "types.gguf");
  const test::TempDirectory directory;
  std::mt19937 random(7);
  int num_refused = 0;
  constexpr int kRounds = 300;
  constexpr size_t kHeader = 1500;
  for (int round = 0; round < kRounds; ++round) {
    std::string changed = bytes;
    changed[random() % kHeader] = static_cast<char>(random());
    const std::string message = outcome_of(directory / "x.gguf", changed);
    EXPECT_EQ(message.find("INTERNAL ASSERT"), std::string::npos) << message;
    num_refused += !message.empty();
  }
  EXPECT_GT(num_refused, kRounds / 10);
}

}  // namespace
}  // namespace baseq

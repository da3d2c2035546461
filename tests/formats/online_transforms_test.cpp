#include <gtest/gtest.h>

#include "../tiny_model.h"
#include "baseq/export/export_checkpoint.h"
#include "baseq/model/model.h"
#include "formats/native/config.h"

namespace baseq {
namespace {

using test::expect_error;
using test::TempDirectory;
using test::TinyShape;

/// A native checkpoint of unrounded codes, whose blocks have online transforms that `set` puts there.
class OnlineExport : public testing::TestWithParam<TinyShape> {
 protected:
  template <class Set>
  Checkpoint native(Set&& set) {
    const TinyShape& shape = GetParam();
    auto tensors = test::tiny_tensors(shape, 1);
    std::erase_if(tensors, [](const auto& item) { return item.first.starts_with("model.layers."); });
    QuantizationConfig quantization{.weights = QuantSpec{.num_bits = 4, .scale_dtype = at::kBFloat16}};
    for (int64_t block = 0; block < shape.num_layers; ++block) {
      DecoderLayer layer = test::tiny_layer(shape, 3 + static_cast<uint64_t>(block), at::kFloat);
      layer.for_each_linear([&](const std::string&, Linear& linear) {
        linear.quantized = round_to_nearest(linear.weight, *quantization.weights);
        linear.weight = linear.dequantized();
      });
      set(layer, block);
      tensors.merge(layer_tensors(layer, layer_prefix(block), at::kFloat));
    }
    nlohmann::json config = test::tiny_config(shape);
    config["quantization_config"] = to_json(quantization);
    test::write_checkpoint(directory / "native", config, tensors);
    return Checkpoint(directory / "native");
  }
  static int64_t width(Site site) { return site_shape(site, test::tiny_model_config(GetParam())).width(); }
  static Tensor invertible(at::IntArrayRef sizes) {
    return (at::eye(sizes.back(), at::kDouble) + 0.1 * test::random_normal(sizes, 5)).to(at::kFloat);
  }

  TempDirectory directory;
};

TEST_P(OnlineExport, DenseWeightsHaveEveryKindMerged) {
  const Checkpoint checkpoint = native([&](DecoderLayer& layer, int64_t block) {
    const int64_t hidden = width(Site::kQkv), dim = width(Site::kQueryKey);
    layer.transform(Site::kQkv) = {scale_factor(test::random_normal({hidden}, 7, at::kFloat).exp()),
                                   matrix_factor(invertible({2, hidden / 2, hidden / 2}))};
    layer.transform(Site::kQueryKey) = {matrix_factor(invertible({dim, dim}))};
    layer.transform(Site::kO) = {permutation_factor(at::arange(width(Site::kO), at::kLong).roll({3}))};
    if (block == 1) layer.transform(Site::kGateUp) = {hadamard_factor(hidden)};
    const int64_t ffn = width(Site::kDown);
    layer.transform(Site::kDown) = {kronecker_factor(invertible({2, 2}), invertible({ffn / 2, ffn / 2})),
                                    hadamard_factor(ffn / 2, 2)};
  });
  const ExportPlan plan = plan_export(checkpoint, {.dtype = at::kFloat});
  for (const PlannedTensor& tensor : plan.tensors) EXPECT_EQ(tensor.name.find(".transform."), std::string::npos);
  write_export(checkpoint, plan, directory / "out");
  const Tensor ids = test::random_ids({2, 11}, GetParam().vocab_size, 4);
  const Checkpoint out(directory / "out");
  EXPECT_LT(test::relative_error(Model(out).logits(ids), Model(checkpoint).logits(ids)), 1e-5);
  // The other formats hold codes, and the transforms would have to run.
  expect_error([&] { plan_export(checkpoint, {.format = ExportFormat::kGptq}); },
               {"q, k, v input (site qkv)", "site o", "site gate_up", "site down"});
  expect_error([&] { plan_export(checkpoint, {.format = ExportFormat::kCompressedTensors}); },
               {"q, k, v input (site qkv) that is not one Hadamard transform for all blocks", "(site gate_up) that",
                "(site down) that"});
}

TEST_P(OnlineExport, CompressedTensorsHasAGroupForEverySiteWithAHadamard) {
  const TinyShape& shape = GetParam();
  const Checkpoint checkpoint = native([&](DecoderLayer& layer, int64_t) {
    layer.transform(Site::kGateUp) = {hadamard_factor(4, shape.hidden_size / 4)};
  });
  if (test::tiny_model_config(shape).mlp_bias) {
    expect_error([&] { plan_export(checkpoint, {.format = ExportFormat::kCompressedTensors}); },
                 {"a bias of mlp.gate_proj, whose input an online transform passes", "mlp.up_proj"});
    return;
  }
  const ExportPlan plan = plan_export(checkpoint, {.format = ExportFormat::kCompressedTensors});
  const auto& groups = plan.config.at("quantization_config").at("transform_config").at("config_groups");
  ASSERT_EQ(groups.size(), 1u);
  EXPECT_EQ(groups.at("gate_up").at("head_dim"), 4);
  const bool fused = test::tiny_model_config(shape).fused_projections;
  EXPECT_EQ(groups.at("gate_up").at("apply").at(0).at("targets").at(0),
            fused ? "re:.*(gate_up_proj)$" : "re:.*(gate_proj|up_proj)$");
}

INSTANTIATE_TEST_SUITE_P(Shapes, OnlineExport, testing::ValuesIn(test::tiny_shapes()),
                         [](const auto& shape) { return shape.param.name; });

}  // namespace
}  // namespace baseq

// Peak memory of the three stages of BASE-Q on one Llama block, beside the sum of what they cannot do without: the
// block, gradients and optimizer state of what is learned, the internals of one batch, and the activation streams:
// learning_memory [hidden] [ffn] [heads] [kv_heads] [windows] [tokens]
#include <ATen/Parallel.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "pipeline/steps.h"
#include "random_block.h"

namespace {

using baseq::Tensor;

int64_t held = 0, peak = 0;

/// Counts what tensors hold; the size stands in front of the memory.
class CountingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t num_bytes) override {
    auto* block = static_cast<char*>(std::aligned_alloc(kHeader, (num_bytes + 2 * kHeader - 1) / kHeader * kHeader));
    TORCH_CHECK(block != nullptr, "out of memory");
    *reinterpret_cast<int64_t*>(block) = static_cast<int64_t>(num_bytes);
    peak = std::max(peak, held += static_cast<int64_t>(num_bytes));
    return {block + kHeader, block + kHeader, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

 private:
  static constexpr size_t kHeader = 64;

  static void release(void* memory) {
    if (memory == nullptr) return;
    char* block = static_cast<char*>(memory) - kHeader;
    held -= *reinterpret_cast<int64_t*>(block);
    std::free(block);
  }
};

struct Shape {
  int64_t hidden = 2048, ffn = 5504, heads = 16, kv_heads = 16, windows = 8, tokens = 1024;
  int64_t head_dim() const { return hidden / heads; }
};

/// What fn adds at its peak to what is held before it.
template <class Fn>
int64_t growth(Fn&& fn) {
  const int64_t before = held;
  peak = before;
  fn();
  return peak - before;
}

std::vector<baseq::Step> learn_transforms() {
  using Kind = baseq::TransformStep::Kind;
  using baseq::Site;
  return {baseq::TransformStep{.kind = Kind::kScale, .at = {Site::kValue, Site::kDown}},
          baseq::TransformStep{.kind = Kind::kMatrix, .at = {Site::kValue}},
          baseq::TransformStep{.at = {Site::kValue, Site::kQueryKey, Site::kDown}},
          baseq::TransformStep{.kind = Kind::kScale, .at = {Site::kO}},
          baseq::PointsStep{.at = {Site::kO, Site::kDown}, .clip = 0.88, .shift = baseq::PointsStep::Shift::kZero},
          baseq::LearnStep{.weights = baseq::LearnStep::Weights::kStraightThrough,
                           .epochs = 1,
                           .rates = {{"*.scale", 3e-3}, {"value.matrix", 3e-3}, {"*.clip", 3e-2}, {"*.shift", 2e-3}}},
          baseq::PointsStep{.at = {Site::kQkv, Site::kGateUp}, .clip = 0.88, .shift = baseq::PointsStep::Shift::kMean},
          baseq::PointsStep{.at = {Site::kQueryKey, Site::kValue}, .clip = 0.88}};
}

double mib(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

}  // namespace

int main(int argc, char** argv) {
  Shape shape;
  int64_t* const fields[] = {&shape.hidden, &shape.ffn, &shape.heads, &shape.kv_heads, &shape.windows, &shape.tokens};
  for (int i = 1; i < argc && i < 7; ++i) *fields[i - 1] = std::atoll(argv[i]);
  at::set_num_threads(1);  // the counts are not atomic
  CountingAllocator counting;
  c10::SetCPUAllocator(&counting, /*priority=*/255);

  // Made again each time that it is asked for, as a run reads it.
  const auto read_original = [&] {
    at::manual_seed(0);
    return baseq::random_block({shape.hidden, shape.ffn, shape.heads, shape.kv_heads, shape.head_dim()});
  };
  baseq::DecoderLayer layer = read_original();
  int64_t block = 0;
  layer.for_each_linear([&](const std::string&, baseq::Linear& linear) { block += linear.weight.nbytes(); });
  const baseq::ModelConfig config{.hidden_size = shape.hidden,
                                  .intermediate_size = shape.ffn,
                                  .num_hidden_layers = 1,
                                  .num_attention_heads = shape.heads,
                                  .num_key_value_heads = shape.kv_heads,
                                  .head_dim = shape.head_dim(),
                                  .blocks = {{}}};
  baseq::BlockInputs inputs{.full_precision = at::randn({shape.windows, shape.tokens, shape.hidden}),
                            .quantized = {},
                            .rope = baseq::RotaryEmbedding::create(config, shape.tokens, at::kFloat)};
  inputs.quantized = inputs.full_precision.clone();
  const Tensor target = at::empty_like(inputs.full_precision);
  baseq::advance(layer, inputs.full_precision, target, inputs.rope);
  const Tensor weights = baseq::token_weights(target, baseq::Recipe::TokenWeights::kUniform, at::kFloat);
  const int64_t streams = 3 * static_cast<int64_t>(target.nbytes());

  // One window through the plain block and back to the quantity that a first layer of parameters would see.
  const int64_t internals = growth([&] {
    const Tensor x = inputs.full_precision.narrow(0, 0, 1).clone().requires_grad_(true);
    (layer.forward(x, inputs.rope) - target.narrow(0, 0, 1)).square().mean().backward();
  });
  // Adam's two moments and the gradient of a value.
  constexpr int64_t kBytesLearned = 3 * sizeof(float);
  const int64_t dim = shape.head_dim();
  // Stage 1 learns through v, o and down, whose gradients are as large as they.
  const int64_t learned_weights = layer.self_attn.v_proj.weight.nbytes() + layer.self_attn.o_proj.weight.nbytes() +
                                  layer.mlp.down_proj.weight.nbytes();
  const int64_t stage1 =
      learned_weights + kBytesLearned * (shape.kv_heads * (dim * dim + dim) + 2 * (shape.hidden + shape.ffn));
  const int64_t stage3 = kBytesLearned * 2 * (3 * shape.hidden + shape.ffn);
  std::printf("block %.0f MiB, streams %.0f MiB, internals of %ld tokens %.0f MiB\n", mib(block), mib(streams),
              shape.tokens, mib(internals));

  layer = {};
  const baseq::BlockPlace place{config, 0, at::kFloat};
  baseq::Grids grids{.weights = baseq::QuantSpec{},
                     .input_activations = baseq::Grids::kPerToken,
                     .kv_cache = baseq::Grids::kPerTokenAndHead};
  grids.kv_cache->group_size = dim;
  const baseq::BlockTask task{
      .place = place, .grids = grids, .inputs = inputs, .target = target, .token_weights = weights};
  baseq::OpenBlock open({}, place, read_original);
  open.original();
  const auto report = [&](const char* stage, int64_t learned, const std::vector<baseq::Step>& steps) {
    const int64_t start = held;
    const int64_t top = start + growth([&] {
                          for (const baseq::Step& step : steps) apply_any(step, open, task);
                        });
    const int64_t sum = block + streams + internals + learned;
    std::printf("%-12s peak %7.0f MiB  sum %7.0f MiB  ratio %.2f\n", stage, mib(top), mib(sum),
                static_cast<double>(top) / static_cast<double>(sum));
  };
  report("transforms", stage1, learn_transforms());
  // The second moments of down's inputs in float64, their factor, and one copy.
  const int64_t moments = 3 * shape.ffn * shape.ffn * static_cast<int64_t>(sizeof(double));
  report("rounding", moments - internals, {baseq::RoundStep{.method = baseq::RoundStep::Method::kGptq}});
  report("activations", stage3,
         {baseq::LearnStep{.epochs = 1, .rates = {{"*.clip", 3e-2}, {"*.shift", 2e-3}, {"*.gain", 3e-3}}}});
}

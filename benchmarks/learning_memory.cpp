// Peak memory of the three stages of BASE-Q on one Llama block, beside the sum of what they cannot do without: the
// block, gradients and optimizer state of what is learned, the internals of one batch, and the activation streams:
// learning_memory [hidden] [ffn] [heads] [kv_heads] [windows] [tokens]
#include <ATen/ATen.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/GradMode.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

#include "baseq/pipeline/learn.h"
#include "baseq/pipeline/statistics.h"

namespace {

using baseq::Tensor;

std::atomic<int64_t> held{0}, peak{0};

/// Counts what tensors hold; everything is passed on to the allocator that was there.
class CountingAllocator final : public c10::Allocator {
 public:
  explicit CountingAllocator(c10::Allocator* wrapped) : wrapped_(wrapped) {}

  c10::DataPtr allocate(size_t num_bytes) override {
    auto* block = new Block{wrapped_->allocate(num_bytes), static_cast<int64_t>(num_bytes)};
    const int64_t now = held += block->num_bytes;
    for (int64_t seen = peak; seen < now && !peak.compare_exchange_weak(seen, now);) {
    }
    return {block->memory.get(), block, &release, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t count) const override { wrapped_->copy_data(to, from, count); }

 private:
  struct Block {
    c10::DataPtr memory;
    int64_t num_bytes;
  };
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    held -= block->num_bytes;
    delete block;
  }
  c10::Allocator* wrapped_;
};

struct Shape {
  int64_t hidden = 2048, ffn = 5504, heads = 16, kv_heads = 16, windows = 8, tokens = 1024;
  int64_t head_dim() const { return hidden / heads; }
};

baseq::DecoderLayer random_layer(const Shape& shape) {
  const auto weight = [](int64_t out, int64_t in) {
    return at::randn({out, in}).div_(std::sqrt(static_cast<double>(in)));
  };
  baseq::DecoderLayer layer;
  layer.input_layernorm.weight = layer.post_attention_layernorm.weight = at::ones({shape.hidden});
  baseq::Attention& attention = layer.self_attn;
  attention.num_heads = shape.heads;
  attention.num_kv_heads = shape.kv_heads;
  attention.head_dim = shape.head_dim();
  attention.q_proj.weight = weight(shape.hidden, shape.hidden);
  attention.k_proj.weight = weight(shape.kv_heads * shape.head_dim(), shape.hidden);
  attention.v_proj.weight = weight(shape.kv_heads * shape.head_dim(), shape.hidden);
  attention.o_proj.weight = weight(shape.hidden, shape.hidden);
  layer.mlp.gate_proj.weight = weight(shape.ffn, shape.hidden);
  layer.mlp.up_proj.weight = weight(shape.ffn, shape.hidden);
  layer.mlp.down_proj.weight = weight(shape.hidden, shape.ffn);
  return layer;
}

/// What fn adds at its peak to what is held before it.
template <class Fn>
int64_t growth(Fn&& fn) {
  const int64_t before = held;
  peak = before;
  fn();
  return peak - before;
}

double mib(int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); }

}  // namespace

int main(int argc, char** argv) {
  Shape shape;
  int64_t* const fields[] = {&shape.hidden, &shape.ffn, &shape.heads, &shape.kv_heads, &shape.windows, &shape.tokens};
  for (int i = 1; i < argc && i < 7; ++i) *fields[i - 1] = std::atoll(argv[i]);
  CountingAllocator counting(c10::GetCPUAllocator());
  c10::SetCPUAllocator(&counting, /*priority=*/255);

  baseq::Recipe recipe = baseq::Recipe::from_json(
      {{"weights", {{"num_bits", 4}}},
       {"rounding", {{"method", "gptq"}}},
       {"input_activations", {{"num_bits", 4}, {"clip", 0.88}, {"norm_shift", "mean"}, {"shift", "zero"}}},
       {"kv_cache", {{"num_bits", 4}, {"clip", 0.88}}},
       {"transforms", {{"value", "hadamard"}, {"query_key", "hadamard"}, {"down", "hadamard"}}},
       {"learn_transforms", {{"epochs", 1}}},
       {"learn_activations", {{"epochs", 1}}}},
      "benchmark");
  recipe.kv_cache->spec.group_size = shape.head_dim();

  baseq::DecoderLayer layer = random_layer(shape);
  int64_t block = 0;
  layer.for_each_linear([&](const std::string&, baseq::Linear& linear) { block += linear.weight.nbytes(); });
  const baseq::ModelConfig config{.head_dim = shape.head_dim()};
  baseq::BlockInputs inputs{.full_precision = at::randn({shape.windows, shape.tokens, shape.hidden}),
                            .quantized = {},
                            .rope = baseq::RotaryEmbedding::create(config, shape.tokens, at::kFloat)};
  inputs.quantized = inputs.full_precision.clone();
  const Tensor target = at::empty_like(inputs.full_precision);
  baseq::advance(layer, inputs.full_precision, target, inputs.rope);
  const Tensor weights = baseq::token_weights(target, recipe.loss, at::kFloat);
  const int64_t streams = 3 * static_cast<int64_t>(target.nbytes());

  // One window through the plain block and back to the quantity that a first layer of parameters would see.
  const int64_t internals = growth([&] {
    const Tensor x = inputs.full_precision.narrow(0, 0, 1).clone().requires_grad_(true);
    (layer.forward(x, inputs.rope) - target.narrow(0, 0, 1)).square().mean().backward();
  });
  // Adam's two moments and the gradient of a value.
  constexpr int64_t kBytesLearned = 3 * sizeof(float);
  const int64_t dim = shape.head_dim();
  const int64_t stage1 = kBytesLearned * (shape.kv_heads * (dim * dim + dim) + 2 * (shape.hidden + shape.ffn));
  const int64_t stage3 = kBytesLearned * 2 * (3 * shape.hidden + shape.ffn);
  std::printf("block %.0f MiB, streams %.0f MiB, internals of %ld tokens %.0f MiB\n", mib(block), mib(streams),
              shape.tokens, mib(internals));

  const baseq::ProgressFn silent;
  const baseq::LearningTask task{
      .recipe = recipe, .inputs = inputs, .target = target, .token_weights = weights, .progress = silent};
  const c10::NoGradGuard no_grad;
  const auto report = [&](const char* stage, int64_t learned, auto&& fn) {
    const int64_t start = held;
    const int64_t top = start + growth(fn);
    const int64_t sum = block + streams + internals + learned;
    std::printf("%-12s peak %7.0f MiB  sum %7.0f MiB  ratio %.2f\n", stage, mib(top), mib(sum),
                static_cast<double>(top) / static_cast<double>(sum));
  };
  report("transforms", stage1, [&] { baseq::learn_transforms(layer, task); });
  report("rounding", 0, [&] { baseq::round_layer(layer, recipe, inputs, weights, 0, silent); });
  report("activations", stage3, [&] { baseq::learn_activations(layer, task); });
}

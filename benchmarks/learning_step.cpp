// Time of one step of BASE-Q's learned stages on a Llama block, over the same step with every quantizer replaced by the
// identity: learning_step [threads] [hidden] [ffn] [heads] [kv_heads] [tokens]
#include <ATen/Parallel.h>
#include <c10/core/GradMode.h>
#include <malloc.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "random_block.h"

namespace {

using baseq::Tensor;

constexpr int64_t kHeadDim = 64;
constexpr int kRepetitions = 15;

struct Shape {
  int64_t hidden = 576, ffn = 1536, heads = 9, kv_heads = 3, tokens = 512;
};

/// Gives every point learnable corrections; `quantize` false leaves gain and shift alone in place.
void add_points(baseq::DecoderLayer& layer, const Shape& shape, bool quantize) {
  layer.for_each_quant_point([&](const std::string&, baseq::QuantPoint& point) {
    const bool cache = &point == &layer.self_attn.k_cache || &point == &layer.self_attn.v_cache;
    const bool down = &point == &layer.mlp.down_input;
    point.enabled = quantize;
    if (cache) {
      point.spec.strategy = baseq::Strategy::kGroup;
      point.spec.group_size = kHeadDim;
    }
    point.clip = at::full({cache ? shape.kv_heads : 1, 1}, 0.88).requires_grad_(true);
    if (cache) return;
    const int64_t features = down ? shape.ffn : shape.hidden;
    point.gain = at::ones({features}).requires_grad_(true);
    point.shift = at::zeros({features}).requires_grad_(true);
  });
}

double median_milliseconds(const std::function<void()>& step) {
  std::vector<double> times;
  for (int i = 0; i < kRepetitions + 2; ++i) {
    const auto start = std::chrono::steady_clock::now();
    step();
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(times.begin() + 2, times.end());  // two to warm up
  return times[2 + kRepetitions / 2];
}

void report(const char* stage, double quantized, double identity) {
  std::printf("%-8s %8.1f ms  identity %8.1f ms  ratio %.2f\n", stage, quantized, identity, quantized / identity);
}

}  // namespace

int main(int argc, char** argv) {
  // As the baseq program does.
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
  Shape shape;
  if (argc > 1) at::set_num_threads(std::atoi(argv[1]));
  int64_t* const fields[] = {&shape.hidden, &shape.ffn, &shape.heads, &shape.kv_heads, &shape.tokens};
  for (int i = 2; i < argc && i < 7; ++i) *fields[i - 2] = std::atoll(argv[i]);
  const Tensor x = at::randn({1, shape.tokens, shape.hidden}), target = at::randn_like(x);
  const baseq::ModelConfig config{.head_dim = kHeadDim};
  const auto rope = baseq::RotaryEmbedding::create(config, shape.tokens, at::kFloat);
  baseq::DecoderLayer base = baseq::random_block({shape.hidden, shape.ffn, shape.heads, shape.kv_heads, kHeadDim});
  base.self_attn.query_key_transform = {baseq::hadamard_factor(kHeadDim)};
  base.mlp.down_transform = {baseq::hadamard_factor(shape.ffn)};

  for (const at::ScalarType products : {at::kFloat, at::kBFloat16}) {
    std::printf("products in %s, %d thread(s)\n", c10::toString(products), at::get_num_threads());
    double stage3[2], stage1[2];
    for (const bool quantize : {false, true}) {
      baseq::DecoderLayer layer = base;
      add_points(layer, shape, quantize);
      layer.for_each_linear([&](const std::string&, baseq::Linear& l) { l.weight = l.weight.to(products); });
      stage3[quantize] = median_milliseconds([&] { (layer.forward(x, rope) - target).square().mean().backward(); });

      // Stage 1: three learned weights with straight-through rounding, o's and down's inputs quantized.
      layer.for_each_quant_point([&](const std::string& name, baseq::QuantPoint& point) {
        if (!name.ends_with("_proj.input_quant")) point = {};
      });
      const baseq::QuantSpec grid{.num_bits = 4};
      std::vector<Tensor> leaves;
      for (const Tensor& weight :
           {base.self_attn.v_proj.weight, base.self_attn.o_proj.weight, base.mlp.down_proj.weight}) {
        leaves.push_back(weight.clone().requires_grad_(true));
      }
      stage1[quantize] = median_milliseconds([&] {
        baseq::DecoderLayer candidate = layer;
        baseq::Linear* const linears[] = {&candidate.self_attn.v_proj, &candidate.self_attn.o_proj,
                                          &candidate.mlp.down_proj};
        for (size_t i = 0; i < leaves.size(); ++i) {
          const Tensor weight =
              quantize ? baseq::fake_quantize(leaves[i], baseq::compute_qparams(leaves[i], grid), grid) : leaves[i];
          linears[i]->weight = weight.to(products);
        }
        (candidate.forward(x, rope) - target).square().mean().backward();
      });
    }
    report("stage 1", stage1[1], stage1[0]);
    report("stage 3", stage3[1], stage3[0]);
  }
}

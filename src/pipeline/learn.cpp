#include "baseq/pipeline/learn.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <chrono>
#include <cmath>

#include "baseq/pipeline/block_optimizer.h"
#include "baseq/pipeline/merge.h"
#include "baseq/pipeline/start_points.h"
#include "baseq/transform/hadamard.h"
#include "baseq/transform/transform.h"

namespace baseq {
namespace {

/// Clip ratios are learned through a sigmoid; a start at exactly 1 would have no gradient.
constexpr double kLargestClip = 0.999;

Tensor leaf(const Tensor& value) { return value.detach().clone().requires_grad_(true); }

/// Leaves for the corrections of the quant points, by the name of the point.
class PointParameters {
 public:
  struct Choice {
    bool clip = true, shift = true, gain = true;
  };

  PointParameters() = default;
  PointParameters(const DecoderLayer& layer, const Choice& choice) {
    for (const SiteInfo& info : sites()) {
      if (info.point.empty() || !layer.point(info.site).enabled) continue;
      const QuantPoint& point = layer.point(info.site);
      Leaves& leaves = leaves_[std::string(info.point)];
      if (choice.clip) {
        leaves.start_clip = point.clip;
        leaves.clip_logit = leaf(at::logit(point.clip.clamp_max(kLargestClip)));
      }
      if (choice.shift && point.shift.defined()) leaves.shift = leaf(point.shift);
      if (choice.gain && !info.cache) leaves.gain = leaf(point.gain.defined() ? point.gain : ones(layer, info));
    }
  }

  /// Puts the current values into the points of `layer`; differentiable.
  void apply(DecoderLayer& layer) const {
    layer.for_each_quant_point([&](const std::string& name, QuantPoint& point) {
      const auto it = leaves_.find(name);
      if (it == leaves_.end()) return;
      if (it->second.clip_logit.defined()) point.clip = at::sigmoid(it->second.clip_logit);
      if (it->second.shift.defined()) point.shift = it->second.shift;
      if (it->second.gain.defined()) point.gain = it->second.gain;
    });
  }

  /// Where learning kept the start: clips above kLargestClip are again what they were.
  void restore_full_clips(DecoderLayer& layer) const {
    layer.for_each_quant_point([&](const std::string& name, QuantPoint& point) {
      const auto it = leaves_.find(name);
      if (it == leaves_.end() || !it->second.start_clip.defined()) return;
      const Tensor& start = it->second.start_clip;
      point.clip = at::where(start > kLargestClip, start, point.clip);
    });
  }

  void add_groups(std::vector<ParameterGroup>& groups, double lr_clip, double lr_shift, double lr_gain) const {
    const auto add = [&](Tensor Leaves::*member, double learning_rate) {
      ParameterGroup group{.parameters = {}, .learning_rate = learning_rate};
      for (const auto& [name, leaves] : leaves_) {
        if ((leaves.*member).defined()) group.parameters.push_back(leaves.*member);
      }
      if (!group.parameters.empty()) groups.push_back(std::move(group));
    };
    add(&Leaves::clip_logit, lr_clip);
    add(&Leaves::shift, lr_shift);
    add(&Leaves::gain, lr_gain);
  }

 private:
  struct Leaves {
    Tensor start_clip, clip_logit, shift, gain;
  };

  static Tensor ones(const DecoderLayer& layer, const SiteInfo& info) {
    return at::ones({layer.shape(info.site).features}, layer.linear(info.readers[0]).weight.options());
  }

  std::map<std::string, Leaves> leaves_;
};

/// The linears in the dtype of the recipe's products; what is frozen is converted once and for all.
void convert_linears(DecoderLayer& layer, at::ScalarType dtype) {
  layer.for_each_linear([&](const std::string&, Linear& linear) { linear.weight = linear.weight.to(dtype); });
}

/// Windows of which every token counts: one that does not would make the loss of its window NaN.
Tensor countable_windows(const Tensor& token_weights) {
  return token_weights.ne(0).all(1).nonzero().flatten().to(at::kCPU);
}

/// Runs the optimizer over the windows for a layer that `build` makes from the current parameters. Returns whether an
/// epoch was better than the start.
bool learn(const LearningTask& task, const std::string& stage, int64_t epochs, double final_lr,
           const std::vector<ParameterGroup>& groups, const std::function<DecoderLayer()>& build,
           double epsilon = OptimizeOptions{}.epsilon) {
  const auto start = std::chrono::steady_clock::now();
  const Tensor& stream =
      task.recipe.stream == Recipe::Stream::kQuantized ? task.inputs.quantized : task.inputs.full_precision;
  const auto loss_of = [&](const DecoderLayer& layer, const Tensor& x, const Tensor& target, const Tensor& weights) {
    const Tensor error = (layer.forward(x, task.inputs.rope) - target).square().mean(-1);
    return (error * weights).mean();
  };
  const at::TensorOptions compute = task.inputs.compute();
  const Tensor windows = countable_windows(task.token_weights);
  const int64_t num_samples = windows.size(0);
  if (num_samples == 0) return false;  // the run was told that no token counts
  const auto loss = [&](const Tensor& chosen) {
    task.inputs.pass.step();
    const Tensor indices = windows.index_select(0, chosen);
    return loss_of(build(), stream.index_select(0, indices).to(compute),
                   task.target.index_select(0, indices).to(compute),
                   task.token_weights.index_select(0, indices.to(compute.device())));
  };
  const int64_t num_monitored = std::min(task.recipe.num_monitored, num_samples);
  const auto monitor = [&] {
    const DecoderLayer layer = build();
    double sum = 0;
    for (int64_t i = 0; i < num_monitored; ++i) {
      // Spread over the samples rather than the first ones.
      const auto n = windows[i * num_samples / num_monitored].item<int64_t>();
      task.inputs.pass.step();
      sum += loss_of(layer, stream.narrow(0, n, 1).to(compute), task.target.narrow(0, n, 1).to(compute),
                     task.token_weights.narrow(0, n, 1))
                 .item<double>();
    }
    return sum / static_cast<double>(num_monitored);
  };
  OptimizeOptions options{.epochs = epochs,
                          .batch_size = task.recipe.batch_size,
                          .final_learning_rate = final_lr,
                          .epsilon = epsilon,
                          .seed = task.seed + static_cast<uint64_t>(task.block)};
  if (task.progress) {
    options.on_epoch = [&](int64_t epoch, double loss_now) {
      task.progress(EpochLearned{task.block, stage, epoch, epochs, loss_now});
    };
  }
  const OptimizeResult result = optimize_block(loss, monitor, num_samples, groups, options);
  const bool better = result.best_epoch > 0;
  if (!task.progress) return better;
  const std::string where = "block " + std::to_string(task.block) + ", " + stage;
  if (result.stopped_at_nonfinite) {
    task.progress(Warning{where + ": the loss became NaN or infinite; learning of this stage stopped and the best "
                                  "state so far is kept"});
  } else if (!better) {
    task.progress(Warning{where + ": no epoch lowered the loss; the starting state is kept"});
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  task.progress(StageLearned{task.block, stage, result.loss_before, result.loss_after, seconds});
  return better;
}

/// A weight with straight-through rounding; the clip ratio is searched once per call of refresh.
class StraightThrough {
 public:
  StraightThrough(const QuantSpec& spec, const GptqOptions& options) : spec_(spec), options_(options) {
    // Coarser than where the codes are decided: the ratio is searched again and again while the weight moves.
    constexpr int64_t kSearchSteps = 20;
    options_.search.num_steps = std::min(options_.search.num_steps, kSearchSteps);
  }

  void refresh(const Tensor& weight) {
    const c10::NoGradGuard no_grad;
    const Tensor full = compute_qparams(weight, spec_).scale;
    ratio_ = options_.mse_clip ? search_qparams(weight, spec_, options_.search).scale / full : at::ones_like(full);
  }
  Tensor forward(const Tensor& weight) const {
    const QParams qparams = compute_qparams(weight, spec_, ratio_.unsqueeze(-1));
    return fake_quantize(weight, qparams, spec_);
  }

 private:
  QuantSpec spec_;
  GptqOptions options_;
  Tensor ratio_;  ///< [rows, groups]
};

}  // namespace

void learn_transforms(DecoderLayer& layer, const LearningTask& task) {
  const Recipe& recipe = task.recipe;
  const Recipe::TransformLearning& learning = recipe.learn_transforms;
  TORCH_CHECK(recipe.weights, "learn_transforms: the recipe gives no weight grid");
  const Attention& attention = layer.self_attn;
  const auto options = attention.v_proj.weight.options();
  const int64_t kv = attention.num_kv_heads, dim = attention.head_dim;
  const auto zeros = [&](at::IntArrayRef shape, bool learned) {
    return at::zeros(shape, options).requires_grad_(learned);
  };
  // Scales are learned as logarithms: they cannot cross zero.
  const Tensor rotation = zeros({kv, dim, dim}, learning.value_rotation);
  const Tensor value_scale = zeros({kv, dim, 1}, learning.value_scale);
  const Tensor o_scale = zeros({attention.o_proj.weight.size(1)}, learning.o_scale && recipe.input_activations);
  const Tensor down_scale = zeros({layer.mlp.down_proj.weight.size(1)}, learning.down_scale);
  const DecoderLayer base = layer;
  Recipe::Transforms rest = recipe.transforms;
  rest.value = false;
  const Tensor identity = at::eye(dim, options);
  const Tensor hadamard = recipe.transforms.value ? hadamard_transform(identity) : identity;

  const auto transformed = [&] {
    DecoderLayer candidate = base;
    const Tensor turned = at::matmul(cayley(rotation), hadamard);
    transform_values(candidate, value_scale.exp() * turned, (-value_scale).exp() * turned);
    candidate.mlp.down_scale = down_scale.exp();
    candidate.mlp.down_proj.weight = candidate.mlp.down_proj.weight * (-down_scale).exp();
    apply_hadamards(candidate, rest);
    if (o_scale.requires_grad()) {
      candidate.self_attn.o_input.gain = o_scale.exp();
      candidate.self_attn.o_proj.weight = candidate.self_attn.o_proj.weight * (-o_scale).exp();
    }
    return candidate;
  };
  // Linears that no learned transform touches are converted once, the others rounded straight-through at each step.
  std::map<std::string, Tensor> frozen;
  std::map<std::string, StraightThrough> rounded;
  // The quant points see the Hadamard basis; only those behind learned transforms are on in this stage.
  std::map<std::string, QuantPoint> on;
  PointParameters points;
  {
    const at::AutoGradMode with_grad(true);
    DecoderLayer started = transformed();
    started.for_each_linear([&](const std::string& name, const Linear& linear) {
      if (linear.weight.requires_grad()) {
        rounded.emplace(name, StraightThrough(*recipe.weights, recipe.gptq));
      } else {
        frozen[name] = linear.weight.to(recipe.products);
      }
    });
    started = started.detach();
    start_quant_points(started, recipe, task.inputs, task.token_weights, {Site::kO, Site::kDown});
    points = PointParameters(started, {.clip = true, .shift = true, .gain = false});
    started.for_each_quant_point([&](const std::string& name, const QuantPoint& point) {
      if (point.enabled) on[name] = point;
    });
  }
  int64_t steps = 0;
  const auto build = [&] {
    DecoderLayer candidate = transformed();
    candidate.for_each_quant_point([&](const std::string& name, QuantPoint& point) {
      const auto it = on.find(name);
      if (it == on.end()) return;
      const Tensor gain = point.gain;
      point = it->second;
      point.gain = gain;
    });
    points.apply(candidate);
    // As often as the published method searches its clip again.
    constexpr int64_t kStepsPerSearch = 10;
    // States are compared with the clip that suits each.
    const bool search = !c10::GradMode::is_enabled() || steps++ % kStepsPerSearch == 0;
    candidate.for_each_linear([&](const std::string& name, Linear& linear) {
      if (const auto it = frozen.find(name); it != frozen.end()) {
        linear.weight = it->second;
        return;
      }
      StraightThrough& grid = rounded.at(name);
      if (search) grid.refresh(linear.weight);
      linear.weight = grid.forward(linear.weight).to(recipe.products);
    });
    return candidate;
  };
  std::vector<ParameterGroup> groups;
  if (rotation.requires_grad()) groups.push_back({{rotation}, learning.lr_rotation});
  ParameterGroup scales{.parameters = {}, .learning_rate = learning.lr_scale};
  for (const Tensor& scale : {value_scale, o_scale, down_scale}) {
    if (scale.requires_grad()) scales.parameters.push_back(scale);
  }
  if (!scales.parameters.empty()) groups.push_back(scales);
  points.add_groups(groups, learning.lr_clip, learning.lr_shift, 0);
  const bool better = learn(task, "transforms", learning.epochs, learning.final_lr, groups, build);

  const c10::NoGradGuard no_grad;
  layer = transformed();
  start_quant_points(layer, recipe, task.inputs, task.token_weights);
  points.apply(layer);
  if (!better) points.restore_full_clips(layer);
  layer = layer.detach();
  if (o_scale.requires_grad()) layer.self_attn.o_input.gain = o_scale.detach().exp();
  merge_down_scale(layer);
}

void learn_activations(DecoderLayer& layer, const LearningTask& task) {
  const Recipe::ActivationLearning& learning = task.recipe.learn_activations;
  const PointParameters points(layer, {.clip = learning.clip, .shift = learning.shift, .gain = learning.gain});
  DecoderLayer frozen = layer;
  convert_linears(frozen, task.recipe.products);
  const auto build = [&] {
    DecoderLayer candidate = frozen;
    points.apply(candidate);
    return candidate;
  };
  std::vector<ParameterGroup> groups;
  points.add_groups(groups, learning.lr_clip, learning.lr_shift, learning.lr_gain);
  if (groups.empty()) return;
  const bool better = learn(task, "activations", learning.epochs, learning.final_lr, groups, build);
  const c10::NoGradGuard no_grad;
  points.apply(layer);
  if (!better) points.restore_full_clips(layer);
  layer = layer.detach();
}

void learn_low_rank(DecoderLayer& layer, const std::map<std::string, Tensor>& weights, const LearningTask& task) {
  const Recipe::LowRank& low_rank = *task.recipe.low_rank;
  const QuantSpec& spec = *task.recipe.weights;
  struct Factors {
    Tensor A, B, clip;
  };
  std::map<std::string, Factors> learned;
  std::vector<ParameterGroup> groups;
  layer.for_each_linear([&](const std::string& name, const Linear& linear) {
    Factors& factors = learned[name];
    factors = {leaf(linear.lora.dequantized_A()), leaf(linear.lora.dequantized_B()), {}};
    if (task.recipe.gptq.mse_clip) {
      factors.clip = clip_of(weights.at(name) - linear.lora.product(), spec, linear.quantized->qparams.scale);
    }
    const double unit = std::sqrt(factors.A.detach().square().mean().item<double>());
    groups.push_back({{factors.A, factors.B}, low_rank.block_learning_rate * unit});
  });
  const auto build = [&] {
    DecoderLayer candidate = layer;
    candidate.for_each_linear([&](const std::string& name, Linear& linear) {
      const Factors& factors = learned.at(name);
      linear.weight = feedback_weight(weights.at(name), factors.A, factors.B, spec, low_rank.dtype, factors.clip);
      linear.weight = linear.weight.to(task.recipe.products);
    });
    return candidate;
  };
  // The gradient of an element of a weight shrinks with the weight's size.
  constexpr double kEpsilon = 1e-15;
  if (!learn(task, "low_rank", low_rank.block_epochs, /*final_lr=*/0, groups, build, kEpsilon)) return;
  const c10::NoGradGuard no_grad;
  layer.for_each_linear([&](const std::string& name, Linear& linear) {
    const Factors& factors = learned.at(name);
    linear.lora = store_factors(factors.A.detach(), factors.B.detach(), low_rank.dtype);
    linear.quantized = round_beside(weights.at(name), linear.lora, spec, factors.clip);
    linear.weight = linear.dequantized();
  });
}

}  // namespace baseq

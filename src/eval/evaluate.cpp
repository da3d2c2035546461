#include "baseq/eval/evaluate.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "baseq/formats/open_model.h"
#include "cluster/messages.h"
#include "cluster/shards.h"
#include "eval/evaluation_memory.h"
#include "model/exact_rotary.h"
#include "pipeline/activations.h"
#include "pipeline/footprint.h"
#include "quant/finite.h"

namespace baseq {
namespace {

/// Rows of logits held at a time: 512 x 128k x float32 is 256 MiB a model.
constexpr int64_t kTokensPerChunk = 512;

std::string first_not_finite(const std::map<std::string, Tensor>& tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (tensor.defined() && tensor.is_floating_point() && !all_finite(tensor)) return name;
  }
  return "";
}

/// Where a model's values stop being finite: the first place is kept, the others follow from it.
class FiniteCheck {
 public:
  /// @param first the first window that is looked at, of all
  /// @param found what an earlier look found, "" for nothing
  FiniteCheck(int64_t num_windows, int64_t first, std::string found = "")
      : num_windows_(num_windows), first_(first), found_(std::move(found)) {}

  /// @param depth of the place, from 0
  /// @param blame the tensor to name, "" where all that took part are finite; called for the first place only
  void look(bool finite, int64_t window, int64_t depth, const std::string& place,
            const std::function<std::string()>& blame) {
    if (finite || !found_.empty()) return;
    depth_ = depth;
    const std::string tensor = blame();
    found_ = fmt::format(
        "values stop being finite in {}, first in window {} of {}: {}", place, first_ + window + 1, num_windows_,
        tensor.empty() ? "its tensors are finite, so its activations overflow" : tensor + " holds NaN or infinity");
  }
  void look_at_head(bool finite, int64_t window, const Model& model) {
    look(finite, window, std::numeric_limits<int64_t>::max(), "the head", [&] {
      return first_not_finite({{"its weight", model.lm_head().weight}});
    });
  }
  const std::string& found() const { return found_; }
  /// Afterwards all processes have the first of the places that they found.
  void share(const Communicator& communicator) {
    const std::string own = found_;
    const Tensor own_depth = at::scalar_tensor(depth_, at::kLong);
    found_ = "";
    for (int64_t rank = 0; rank < communicator.size; ++rank) {
      const std::string found = broadcast(communicator, own, rank);
      const auto depth = broadcast(communicator, own_depth, rank).item<int64_t>();
      if (found.empty() || (!found_.empty() && depth >= depth_)) continue;
      found_ = found;
      depth_ = depth;
    }
  }

 private:
  int64_t num_windows_, first_, depth_ = 0;
  std::string found_;
};

/// Hidden states after the last norm, [n, seq, hidden].
Tensor hidden_states(const Model& model, const Tensor& windows, const EvaluateOptions& options,
                     const std::function<void()>& block_done, FiniteCheck& check) {
  const std::filesystem::path& directory = options.activations_directory;
  const std::vector<int64_t> shape{windows.size(0), windows.size(1), model.config().hidden_size};
  const auto compute = at::TensorOptions().dtype(model.options().dtype).device(model.options().device);
  const ActivationStorage storage{.dtype = model.options().dtype, .directory = directory};
  const Tensor hidden = directory.empty() ? at::empty(shape, compute) : storage.allocate(shape);
  for (int64_t n = 0; n < windows.size(0); ++n) {
    const Tensor embedded = model.embed(windows.narrow(0, n, 1));
    check.look(all_finite(embedded), n, 0, "the embedding", [] { return "model.embed_tokens.weight"; });
    hidden.narrow(0, n, 1).copy_(embedded);
  }
  const RotaryEmbedding rope = rotary_of(model, windows.size(1), options.load);
  for (int64_t i = 0; i < model.config().num_hidden_layers; ++i) {
    const DecoderLayer layer = model.layer(i, options.load);
    for (int64_t n = 0; n < hidden.size(0); ++n) {
      const Tensor window = hidden.narrow(0, n, 1);
      const Tensor output = layer.forward(window.to(compute), rope);
      check.look(all_finite(output), n, i + 1, fmt::format("model.layers.{}", i), [&] {
        return first_not_finite(layer_tensors(model.layer(i), layer_prefix(i), model.options().dtype));
      });
      window.copy_(output);
    }
    block_done();
  }
  const RmsNorm norm = model.final_norm(options.load);
  for (int64_t n = 0; n < hidden.size(0); ++n) {
    const Tensor normed = norm.forward(hidden[n].to(compute));
    check.look(all_finite(normed), n, model.config().num_hidden_layers + 1, "the final norm", [&] {
      return first_not_finite({{"model.norm.weight", norm.weight}});
    });
    hidden[n].copy_(normed);
  }
  return hidden;
}

bool is_known(const Reference& reference, const Tensor& windows, const LoadOptions& load) {
  return reference.windows.defined() && at::equal(reference.windows, windows) && reference.load == load;
}

/// Of the tokens `targets`, summed; not finite as soon as one value of a row of logits is not.
double loss_of(const Tensor& log_probabilities, const Tensor& targets) {
  return -log_probabilities.gather(1, targets.unsqueeze(1)).sum(at::kDouble).item<double>();
}

}  // namespace

Evaluation evaluate(const Model& model, const Tensor& all_windows, Reference* reference,
                    const EvaluateOptions& options) {
  const c10::NoGradGuard no_grad;
  TORCH_CHECK(all_windows.dim() == 2 && all_windows.size(1) >= 2, "evaluate: expected windows [n, seq_len >= 2], got ",
              all_windows.sizes());
  const Communicator& communicator = options.communicator;
  TORCH_CHECK(communicator.size == 1 || !options.logits, "evaluate: several processes have no `logits` in order");
  const Shards shards =
      communicator.size == 1 ? Shards() : Shards(communicator, all_windows.size(0), communicator.size);
  const Tensor windows = shards.own(all_windows);
  TORCH_CHECK(!reference || reference->model.config().vocab_size == model.config().vocab_size,
              "evaluate: the reference has a vocabulary of ", reference ? reference->model.config().vocab_size : 0,
              " but the model one of ", model.config().vocab_size);
  const bool runs_reference = reference && !is_known(*reference, windows, options.load);
  int64_t done = 0;
  const int64_t total =
      model.config().num_hidden_layers + (runs_reference ? reference->model.config().num_hidden_layers : 0);
  const auto block_done = [&] {
    if (options.progress) options.progress(++done, total);
  };
  FiniteCheck finite(all_windows.size(0), shards.first_window());
  const Tensor hidden = hidden_states(model, windows, options, block_done, finite);
  FiniteCheck reference_finite(all_windows.size(0), shards.first_window(),
                               reference && !runs_reference ? reference->not_finite : "");
  if (runs_reference) {
    reference->hidden_states.reset();
    reference->hidden_states = hidden_states(reference->model, windows, options, block_done, reference_finite);
    reference->windows = windows;
    reference->load = options.load;
  }
  const Linear head = model.lm_head(options.load);
  const Linear reference_head = reference ? reference->model.lm_head(options.load) : Linear();

  const int64_t predictions = windows.size(1) - 1;
  const int64_t num_chunks = (predictions + kTokensPerChunk - 1) / kTokensPerChunk;
  // Of each window, loss, divergence and agreed tokens of each chunk: added in order, whoever computed them.
  const Tensor values = at::zeros({windows.size(0), 3, num_chunks}, at::kDouble);
  for (int64_t n = 0; n < windows.size(0); ++n) {
    const Tensor targets = windows[n].narrow(0, 1, predictions).to(model.options().device, at::kLong);
    for (int64_t begin = 0; begin < predictions; begin += kTokensPerChunk) {
      const int64_t count = std::min(kTokensPerChunk, predictions - begin);
      const auto rows = [&](const Tensor& of) { return of[n].narrow(0, begin, count).to(model.options().device); };
      Tensor log_p = head.forward(rows(hidden));
      if (options.logits) options.logits(log_p.cpu());
      log_p = at::log_softmax(log_p, -1);
      const Tensor next = targets.narrow(0, begin, count);
      const double model_loss = loss_of(log_p, next);
      finite.look_at_head(std::isfinite(model_loss), n, model);
      const auto value_of = [&, chunk = begin / kTokensPerChunk](int64_t kind) { return values[n][kind][chunk]; };
      value_of(0).fill_(model_loss);
      if (!reference) continue;
      const Tensor log_r = at::log_softmax(reference_head.forward(rows(reference->hidden_states)), -1);
      reference_finite.look_at_head(std::isfinite(loss_of(log_r, next)), n, reference->model);
      value_of(1).fill_((log_r.exp() * (log_r - log_p)).sum(-1).sum(at::kDouble).item<double>());
      value_of(2).fill_((log_p.argmax(-1) == log_r.argmax(-1)).sum().item<double>());
    }
    // The last token predicts nothing.
    if (options.logits)
      options.logits(head.forward(hidden[n].narrow(0, predictions, 1).to(model.options().device)).cpu());
  }
  finite.share(communicator);
  reference_finite.share(communicator);
  const Tensor all = shards.all(values);
  const auto sum_of = [&](int64_t kind) {
    const Tensor terms = all.select(1, kind).contiguous();
    const auto* first = terms.const_data_ptr<double>();
    return std::accumulate(first, first + terms.numel(), 0.0);
  };
  const double loss = sum_of(0), kl = sum_of(1), agreed = sum_of(2);
  Evaluation result;
  result.num_tokens = all_windows.size(0) * predictions;
  result.perplexity = std::exp(loss / static_cast<double>(result.num_tokens));
  if (reference) {
    result.mean_kl = kl / static_cast<double>(result.num_tokens);
    result.top1_agreement = agreed / static_cast<double>(result.num_tokens);
  }
  result.not_finite = finite.found();
  result.reference_not_finite = reference_finite.found();
  if (reference) reference->not_finite = reference_finite.found();
  if (!result.not_finite.empty()) result.perplexity = std::numeric_limits<double>::quiet_NaN();
  // The largest of values that include NaN says nothing.
  if (!result.not_finite.empty() || !result.reference_not_finite.empty()) {
    result.mean_kl = result.top1_agreement = std::numeric_limits<double>::quiet_NaN();
  }
  return result;
}

Footprint evaluation_memory(const ModelConfig& config, int64_t num_windows, int64_t seq_len, bool with_reference,
                            bool activations_on_disk) {
  constexpr int64_t kFloatBytes = 4;
  const int64_t models = with_reference ? 2 : 1;
  int64_t values = 0;
  for (const LinearShape& linear : linear_shapes(config)) values += linear.out_features * linear.in_features;
  // Float32 weights, their codes or the mapped originals, and a pass over one window; later heads and logits.
  const int64_t block = values * (kFloatBytes + 2) + forward_bytes(config, seq_len);
  const int64_t logits =
      config.vocab_size * kFloatBytes * models * (config.hidden_size + 3 * std::min(kTokensPerChunk, seq_len));
  Footprint memory;
  memory.parts.push_back(block > logits ? Footprint::Part{"one block and a pass over a window", block}
                                        : Footprint::Part{"heads and logits", logits});
  if (!activations_on_disk) {
    memory.parts.push_back(
        {"the hidden states of all windows", num_windows * seq_len * config.hidden_size * kFloatBytes * models});
  }
  memory.parts.push_back({"the program", kProcessBytes});
  return memory;
}

}  // namespace baseq

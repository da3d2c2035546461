#include "baseq/eval/evaluate.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

namespace baseq {
namespace {

/// Rows of logits held at a time: 512 x 128k x float32 is 256 MiB a model.
constexpr int64_t kTokensPerChunk = 512;

/// Hidden states after the last norm, [n, seq, hidden].
Tensor hidden_states(const Model& model, const Tensor& windows, const std::function<void()>& block_done) {
  Tensor hidden = model.embed(windows);
  const RotaryEmbedding rope = model.rotary(windows.size(1));
  for (int64_t i = 0; i < model.config().num_hidden_layers; ++i) {
    const DecoderLayer layer = model.layer(i);
    for (int64_t n = 0; n < hidden.size(0); ++n) {
      const Tensor window = hidden.narrow(0, n, 1);
      window.copy_(layer.forward(window, rope));
    }
    block_done();
  }
  const RmsNorm norm = model.final_norm();
  for (int64_t n = 0; n < hidden.size(0); ++n) hidden[n].copy_(norm.forward(hidden[n]));
  return hidden;
}

}  // namespace

Tensor split_windows(const Tensor& ids, int64_t seq_len, int64_t max_windows) {
  TORCH_CHECK(seq_len >= 2, "split_windows: seq_len is ", seq_len, " but a window needs at least 2 tokens");
  int64_t n = ids.numel() / seq_len;
  TORCH_CHECK(n > 0, "split_windows: the text has ", ids.numel(), " tokens but a window needs ", seq_len);
  if (max_windows > 0) n = std::min(n, max_windows);
  return ids.reshape({-1}).narrow(0, 0, n * seq_len).view({n, seq_len});
}

Evaluation evaluate(const Model& model, const Tensor& windows, const Model* reference,
                    const std::function<void(int64_t, int64_t)>& progress) {
  const c10::NoGradGuard no_grad;
  TORCH_CHECK(windows.dim() == 2 && windows.size(1) >= 2, "evaluate: expected windows [n, seq_len >= 2], got ",
              windows.sizes());
  TORCH_CHECK(!reference || reference->config().vocab_size == model.config().vocab_size,
              "evaluate: the reference has a vocabulary of ", reference ? reference->config().vocab_size : 0,
              " but the model one of ", model.config().vocab_size);
  int64_t done = 0;
  const int64_t total = model.config().num_hidden_layers + (reference ? reference->config().num_hidden_layers : 0);
  const auto block_done = [&] {
    if (progress) progress(++done, total);
  };
  const Tensor hidden = hidden_states(model, windows, block_done);
  const Linear head = model.lm_head();
  Tensor reference_hidden;
  Linear reference_head;
  if (reference) {
    reference_hidden = hidden_states(*reference, windows, block_done);
    reference_head = reference->lm_head();
  }

  const int64_t predictions = windows.size(1) - 1;
  double loss = 0, kl = 0, agreed = 0;
  for (int64_t n = 0; n < windows.size(0); ++n) {
    const Tensor targets = windows[n].narrow(0, 1, predictions).to(hidden.device(), at::kLong);
    for (int64_t begin = 0; begin < predictions; begin += kTokensPerChunk) {
      const int64_t count = std::min(kTokensPerChunk, predictions - begin);
      const Tensor log_p = at::log_softmax(head.forward(hidden[n].narrow(0, begin, count)), -1);
      loss -= log_p.gather(1, targets.narrow(0, begin, count).unsqueeze(1)).sum(at::kDouble).item<double>();
      if (!reference) continue;
      const Tensor log_r = at::log_softmax(reference_head.forward(reference_hidden[n].narrow(0, begin, count)), -1);
      agreed += (log_p.argmax(-1) == log_r.argmax(-1)).sum().item<double>();
      kl += (log_r.exp() * (log_r - log_p)).sum(-1).sum(at::kDouble).item<double>();
    }
  }
  Evaluation result;
  result.num_tokens = windows.size(0) * predictions;
  result.perplexity = std::exp(loss / static_cast<double>(result.num_tokens));
  if (reference) {
    result.mean_kl = kl / static_cast<double>(result.num_tokens);
    result.top1_agreement = agreed / static_cast<double>(result.num_tokens);
  }
  return result;
}

}  // namespace baseq

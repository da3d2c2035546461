#pragma once

#include <functional>

#include "baseq/quant/quantize.h"

#pragma GCC visibility push(default)
namespace baseq {

/// An activation or KV cache quantizer with BASE-Q's corrections (arXiv 2506.15689, Eq. 14):
/// `u = gain * x - shift`, forward returns `Q(u) + shift`. A default-constructed point passes its input through.
/// The tensors may require gradients: they are what stage 3 of BASE-Q learns.
///
///     QuantPoint point{.enabled = true};             // 4 bits, dynamic, per token
///     point.clip = at::full({1, 1}, 0.9);            // of each token's range
///     const Tensor y = point.forward(x);             // [.., features]
///
struct QuantPoint {
  bool enabled = false;
  QuantSpec spec{.num_bits = 4, .symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  QParams qparams{};           ///< of a spec that is not dynamic: scale and zero point [1, 1], strategy kTensor
  Tensor clip{};               ///< see compute_qparams; undefined: the full range
  Tensor gain{};               ///< [features]; undefined: 1
  Tensor shift{};              ///< [features]; undefined: 0
  bool add_shift_back = true;  ///< false once W * shift lives in the bias of the layers that read this point
  /// Called with what the readers of this point see; how calibration collects statistics.
  std::function<void(const Tensor&)> observer{};

  /// x: [..., features].
  Tensor forward(const Tensor& x) const;
};

/// `fake_quantize(gain * x - shift) + shift` with dynamic ranges, in one pass forward and one backward.
/// Gradients reach x, clip, gain and shift. CPU float32 is fused, vectorized and threaded; other tensors take the
/// composite of quantize.h, to which it is equal.
/// @param clip [groups, 1]; gain, shift [features]; each may be undefined.
Tensor fake_quantize_dynamic(const Tensor& x, const QuantSpec& spec, const Tensor& clip, const Tensor& gain,
                             const Tensor& shift, bool add_shift_back);

}  // namespace baseq
#pragma GCC visibility pop

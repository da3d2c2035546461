#pragma once

#include <functional>
#include <optional>
#include <string>

#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// How many elements share one scale. Names of compressed-tensors.
enum class Strategy { kTensor, kChannel, kGroup, kToken };

/// The integer grid of a tensor. `quantize` maps onto signed codes in [-2^(b-1), 2^(b-1) - 1].
struct QuantSpec {
  int64_t num_bits = 4;   ///< 2 to 8
  bool symmetric = true;  ///< no zero point
  Strategy strategy = Strategy::kChannel;
  int64_t group_size = 0;  ///< kGroup only: consecutive elements of the last dimension that share a scale
  /// Ranges come from each row as it passes (activations, KV cache). A dynamic asymmetric grid runs from the row's
  /// minimum to its maximum with a real-valued zero point; a static one includes zero and has an integer zero point.
  bool dynamic = false;
  at::ScalarType scale_dtype = at::kFloat;  ///< scales are rounded to this type; they are computed in float32

  bool operator==(const QuantSpec&) const = default;
};

/// Scale and zero point, float32 `[rows, groups]`; `zero_point` is undefined on a symmetric grid.
/// `dequantized = (code - zero_point) * scale`.
struct QParams {
  Tensor scale{};
  Tensor zero_point{};
};

/// A weight on its grid.
///
///     const QuantSpec spec{.num_bits = 4, .strategy = Strategy::kGroup, .group_size = 64};
///     const QParams qparams = compute_qparams(w, spec);  // or search_qparams(w, spec): clips outliers
///     const QuantizedWeight weight{spec, quantize(w, qparams, spec), qparams};
///     const Tensor error = w - weight.dequantized();
struct QuantizedWeight {
  QuantSpec spec{};
  Tensor codes{};              ///< int8 [out_features, in_features]
  QParams qparams{};           ///< [out_features, groups]
  Tensor dequantized() const;  ///< float32 [out_features, in_features]
};

/// Views `x` as `[rows, groups, group_size]`, the shape that every function here works on: one row per slice along the
/// last dimension (kTensor: one row in all). Throws c10::Error when `group_size` does not divide the last dimension.
Tensor group_view(const Tensor& x, const QuantSpec& spec);

/// Scale and zero point from the range of each group. Stays in the autograd graph: gradients reach `x` and `clip`.
/// @param clip  what remains of the range: undefined (all of it), or broadcastable to [rows, groups, 1]. A static
///              grid scales its minimum and maximum; a dynamic grid scales both distances from the middle of the range
///              (BASE-Q, arXiv 2506.15689). A static grid also takes [rows, groups, 2]: the shares of the minimum and
///              of the maximum (OmniQuant, arXiv 2308.13137).
QParams compute_qparams(const Tensor& x, const QuantSpec& spec, const Tensor& clip = {});

struct MseSearch {
  enum class Method {
    kRatios,         ///< the best of `num_steps` ratios of each range
    kHalfQuadratic,  ///< HQQ, see quant/half_quadratic.h; looks at nothing of what follows
  };
  double norm = 2.4;  ///< minimises sum |x - fake_quantize(x)|^norm, as GPTQ's reference does
  int64_t num_steps = 80;
  double max_shrink = 0.8;  ///< ratios 1, 1 - max_shrink/num_steps, ...
  Method method = Method::kRatios;
};

/// The best clip ratio of each group, then compute_qparams with it. Up to 32 steps are all tried; of more, one in a
/// sixteenth of them and then the neighbours of the two best, whose loss is that of all within 0.1 %.
/// @param importance  optional weight of each input channel's error, [in_features] (e.g. the diagonal of a Hessian)
QParams search_qparams(const Tensor& x, const QuantSpec& spec, const MseSearch& search = {},
                       const Tensor& importance = {});

/// Codes as int8, shape of `x`.
Tensor quantize(const Tensor& x, const QParams& qparams, const QuantSpec& spec);

/// float32, shape of `codes`.
Tensor dequantize(const Tensor& codes, const QParams& qparams, const QuantSpec& spec);

/// dequantize(quantize(x)) with the straight-through gradient: identity inside the grid, zero outside for `x`; the
/// scale and the zero point receive the exact gradient of the piecewise linear part.
Tensor fake_quantize(const Tensor& x, const QParams& qparams, const QuantSpec& spec);

// Words for files and kernels that read compressed-tensors' layout; unpack_* gives back what pack_* was given:
//
//     const Tensor words = pack_to_int32(weight.codes, 4);
//     const Tensor codes = unpack_from_int32(words, 4, weight.codes.size(1));
//
// All throw c10::Error for other shapes and dtypes than said, and num_bits outside 2 to 8.

/// Packs signed codes into int32 words as compressed-tensors 0.18 does: `code + 2^(b-1)` as a dense bit stream along
/// the last dimension, least significant bits first.
/// @param codes int8 [rows, columns]; returns int32 [rows, ceil(columns * num_bits / 32)]
Tensor pack_to_int32(const Tensor& codes, int64_t num_bits);

/// The inverse of pack_to_int32: int8 [rows, columns].
Tensor unpack_from_int32(const Tensor& packed, int64_t num_bits, int64_t columns);

/// Zero points [rows, groups] of any dtype as compressed-tensors stores them, packed along the rows: int32
/// [ceil(rows * num_bits / 32), groups].
Tensor pack_zero_points(const Tensor& zero_points, int64_t num_bits);

/// The inverse of pack_zero_points: float32 [rows, groups].
Tensor unpack_zero_points(const Tensor& packed, int64_t num_bits, int64_t rows);

/// Runtime Smooth (arXiv 2409.20361): channels are divided by what the tokens at hand show of them, and multiplied by
/// it after rounding. Channels next to each other in the order of those magnitudes share the largest one of `group`.
struct RuntimeSmooth {
  enum class Span {
    kCausal,  ///< the tokens up to each one
    kWindow,  ///< all tokens, as published. Not causal: what a token becomes depends on later ones
  };
  int64_t group = 128;
  Span span = Span::kCausal;

  bool operator==(const RuntimeSmooth&) const = default;
};

/// The divisors of x [.., tokens, features] whose tokens are a sequence in order: of its size, or [.., 1, features]
/// with kWindow; 1 for channels that are zero. No gradients.
Tensor runtime_divisors(const Tensor& x, const RuntimeSmooth& smooth);

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
  /// Of gain * x - shift; x [.., tokens, features] is then whole sequences. Absent: none.
  std::optional<RuntimeSmooth> runtime{};
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

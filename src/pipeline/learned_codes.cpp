#include "learned_codes.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "quant/cells.h"

namespace baseq {
namespace {

Tensor before_rounding(const Tensor& source, const WeightState& weight) {
  const LearnedCodes& learned = weight.learned;
  Tensor value = learned.change.defined() ? source + learned.change : source;
  if (!learned.offset.defined()) return value;
  const QuantizedWeight& rounded = *weight.codes;
  return value + in_units_of(learned.offset, rounded.qparams.scale.detach(), rounded.spec);
}

}  // namespace

Tensor learned_weight(const Tensor& source, const WeightState& weight) {
  const QuantizedWeight& rounded = *weight.codes;
  const Tensor value = source.defined() ? fake_quantize(before_rounding(source, weight), rounded.qparams, rounded.spec)
                                        : rounded.dequantized();
  return weight.low_rank.defined() ? value + weight.low_rank.product() : value;
}

void settle(WeightState& weight, const Tensor& source) {
  const c10::NoGradGuard no_grad;
  QuantizedWeight& rounded = *weight.codes;
  if (source.defined()) rounded.codes = quantize(before_rounding(source, weight), rounded.qparams, rounded.spec);
  rounded.qparams.scale = rounded.qparams.scale.detach();
  if (rounded.qparams.zero_point.defined()) rounded.qparams.zero_point = rounded.qparams.zero_point.detach();
  weight.learned = {};
}

}  // namespace baseq

#include "baseq/quant/gptq.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

namespace baseq {

Tensor QuantizedWeight::dequantized() const { return dequantize(codes, qparams, spec); }

QuantizedWeight round_to_nearest(const Tensor& weight, const QuantSpec& spec, bool mse_clip, const MseSearch& search) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_floating_point(), "round_to_nearest: weight is ", weight.scalar_type(),
              " of size ", weight.sizes(), ", expected a floating type and [out_features, in_features]");
  const at::NoGradGuard no_grad;
  const Tensor source = weight.to(at::kFloat);
  const QParams qparams = mse_clip ? search_qparams(source, spec, search) : compute_qparams(source, spec);
  return {spec, quantize(source, qparams, spec), qparams};
}

}  // namespace baseq

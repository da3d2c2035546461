#include <ATen/ATen.h>

#include "baseq/quant/quantize.h"
#include "fused.h"
#include "grid.h"

namespace baseq {
namespace {

void check_vector(const char* name, const Tensor& vector, int64_t features) {
  TORCH_CHECK(!vector.defined() || (vector.dim() == 1 && vector.size(0) == features), "fake_quantize_dynamic: ", name,
              " is ", vector.sizes(), ", expected [", features, "]");
}

Tensor apply_gain_and_shift(const Tensor& x, const Tensor& gain, const Tensor& shift) {
  const Tensor scaled = gain.defined() ? x * gain : x;
  return shift.defined() ? scaled - shift : scaled;
}

}  // namespace

Tensor fake_quantize_dynamic(const Tensor& x, const QuantSpec& spec, const Tensor& clip, const Tensor& gain,
                             const Tensor& shift, bool add_shift_back) {
  check_spec("fake_quantize_dynamic", spec);
  TORCH_CHECK(spec.dynamic, "fake_quantize_dynamic: the spec is static, expected dynamic = true");
  TORCH_CHECK(x.dim() >= 1, "fake_quantize_dynamic: x has no dimension, expected [..., features]");
  check_vector("gain", gain, x.size(-1));
  check_vector("shift", shift, x.size(-1));
  if (x.numel() == 0) return x;
  // A gain differs between the elements of a row, so only rows of features can be fused.
  const bool rows_are_features = spec.strategy != Strategy::kTensor || x.dim() == 1;
  if (rows_are_features && is_fusable(x) && is_fusable(clip) && is_fusable(gain) && is_fusable(shift)) {
    const Tensor grouped = group_view(x, spec).contiguous();
    Tensor ratios = clip;
    if (clip.defined()) {
      const int64_t groups = grouped.size(1);
      TORCH_CHECK(at::is_expandable_to(clip.sizes(), {groups, 1}), "fake_quantize_dynamic: clip is ", clip.sizes(),
                  ", expected [", groups, ", 1]");
      ratios = clip.expand({groups, 1});
    }
    return fused_fake_quantize_dynamic(grouped, spec, ratios, gain, shift, add_shift_back).view(x.sizes());
  }
  const Tensor u = apply_gain_and_shift(x, gain, shift);
  const Tensor rounded =
      spec.symmetric ? fake_quantize(u, compute_qparams(u, spec, clip), spec) : fake_quantize_from_base(u, spec, clip);
  return add_shift_back && shift.defined() ? rounded + shift : rounded;
}

Tensor runtime_divisors(const Tensor& x, const RuntimeSmooth& smooth) {
  TORCH_CHECK(x.dim() >= 2, "runtime_divisors: x is ", x.sizes(), ", expected [.., tokens, features]");
  TORCH_CHECK(smooth.group >= 1, "runtime_divisors: group is ", smooth.group, ", expected at least 1");
  const Tensor magnitudes = x.detach().abs();
  const Tensor largest = smooth.span == RuntimeSmooth::Span::kWindow ? magnitudes.amax(-2, /*keepdim=*/true)
                                                                     : std::get<0>(magnitudes.cummax(-2));
  const auto [falling, order] = largest.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
  // The first of a group is its largest.
  const Tensor place = at::arange(falling.size(-1), order.options());
  const Tensor shared = falling.index_select(-1, place - place.remainder(smooth.group));
  const Tensor divisors = at::empty_like(shared).scatter_(-1, order, shared);
  return at::where(divisors.gt(0), divisors, 1.0);
}

Tensor QuantPoint::forward(const Tensor& x) const {
  TORCH_CHECK(!enabled || spec.dynamic || (qparams.scale.defined() && spec.strategy == Strategy::kTensor),
              "QuantPoint: the spec is static, expected dynamic = true, or a scale with Strategy::kTensor");
  Tensor y;
  if (enabled && spec.dynamic && runtime) {
    const Tensor u = apply_gain_and_shift(x, gain, shift), divisors = runtime_divisors(u, *runtime);
    y = fake_quantize_dynamic(u / divisors, spec, clip, {}, {}, false) * divisors;
    if (add_shift_back && shift.defined()) y = y + shift;
  } else if (enabled && spec.dynamic) {
    y = fake_quantize_dynamic(x, spec, clip, gain, shift, add_shift_back);
  } else if (enabled) {
    y = fake_quantize(apply_gain_and_shift(x, gain, shift), qparams, spec);
    if (add_shift_back && shift.defined()) y = y + shift;
  } else {
    y = apply_gain_and_shift(x, gain, add_shift_back ? Tensor() : shift);
  }
  if (observer) observer(y);
  return y;
}

}  // namespace baseq

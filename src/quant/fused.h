#pragma once

#include "baseq/quant/quantize.h"

/// Fake quantization of float32 tensors on the CPU in one pass forward and one backward. Each function is equal to the
/// composition of tensor operations that bears its name without `fused_`.
namespace baseq {

/// @param grouped [rows, groups, group_size], contiguous
Tensor fused_fake_quantize(const Tensor& grouped, const QParams& qparams, const QuantSpec& spec);

/// @param grouped [rows, groups, group_size], contiguous
/// @param clip    [groups, 1] or [groups, 2] or undefined
/// @param gain    [groups * group_size] or undefined, as is `shift`
Tensor fused_fake_quantize_dynamic(const Tensor& grouped, const QuantSpec& spec, const Tensor& clip, const Tensor& gain,
                                   const Tensor& shift, bool add_shift_back);

/// Whether `t` is undefined or a float32 tensor on the CPU.
bool is_fusable(const Tensor& t);

}  // namespace baseq

#pragma once

#include <initializer_list>
#include <span>
#include <vector>

#include "baseq/model/decoder_layer.h"

/// Linears in integers: docs/arithmetic.md.
namespace baseq {

/// gain * x - shift, each rounded on its own: what a point rounds. Throws c10::Error when the point has a shift that no
/// bias gives back.
Tensor with_gain_and_shift(const QuantPoint& point, const Tensor& x);

/// Linears of one input for integer products: from their codes if all have them and `from_codes`, else from their
/// weights.
void prepare_linears(std::span<Linear* const> linears, bool from_codes, int64_t fixed_point_bits);

/// The outputs of linears that read one input. Those that prepare_linears() put together are columns of one matrix.
std::vector<Tensor> forward_together(std::initializer_list<const Linear*> linears, const LinearInput& x);

}  // namespace baseq

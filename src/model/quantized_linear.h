#pragma once

#include <string>
#include <vector>

#include "baseq/io/checkpoint.h"
#include "baseq/model/decoder_layer.h"
#include "baseq/model/quantization_config.h"

/// The linears of a quantized checkpoint as it stores them. Not installed.
namespace baseq {

/// Adds what only the tensors say: the dtype of the scales, and whether groups are runs of neighbouring columns.
void complete_format(LinearFormat& format, const Checkpoint& checkpoint, const std::string& name);

/// The names of the tensors that read_quantized_weight needs.
std::vector<std::string> quantized_weight_names(const std::string& name, const LinearFormat& format);

/// `weight`, on the CPU and in float32, and the codes where they can be kept. Throws naming what does not fit.
/// @param dequantized false: `weight` stays undefined where there are codes
Linear read_quantized_weight(const Checkpoint& checkpoint, const std::string& name, const LinearFormat& format,
                             bool dequantized = true);

/// The static scale of the input that the linears `names` share. Throws when they do not agree.
QParams read_input_scale(const Checkpoint& checkpoint, const std::vector<std::string>& names, const QuantSpec& spec);

}  // namespace baseq

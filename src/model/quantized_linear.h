#pragma once

#include <map>
#include <string>
#include <vector>

#include "baseq/io/checkpoint.h"
#include "baseq/model/decoder_layer.h"
#include "baseq/model/stored_model.h"

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

/// The rows `ids` of such a weight, float32 [ids, in_features]. Unpacks no others. Only of Codes::kPacked.
/// @param ids int64 [n]
Tensor read_quantized_rows(const Checkpoint& checkpoint, const std::string& name, const LinearFormat& format,
                           const Tensor& ids);

/// The rows `ids` of a weight in memory. Not of Strategy::kTensor.
QuantizedWeight select_rows(const QuantizedWeight& weight, const Tensor& ids);

/// What read_quantized_weight reads, as this library writes it, by full name.
std::map<std::string, Tensor> quantized_weight_tensors(const std::string& name, const QuantizedWeight& weight);
/// Types and shapes of those.
std::map<std::string, TensorInfo> quantized_weight_infos(const std::string& name, const QuantSpec& spec,
                                                         int64_t out_features, int64_t in_features);

/// The static scale of the input that the linears `names` share. Throws when they do not agree.
QParams read_input_scale(const Checkpoint& checkpoint, const std::vector<std::string>& names, const QuantSpec& spec);

}  // namespace baseq

#pragma once

#include <map>
#include <string>

#include "baseq/model/decoder_layer.h"

namespace baseq {

/// The tensors of a block as a native checkpoint stores them, by full name: packed codes with compressed-tensors' names
/// for quantized linears, `dtype` for other matrices, float32 for vectors (norms, biases, quant points) and for online
/// transforms, whose inverses are left out where Model::online_transform gives none.
///
///     const auto tensors = layer_tensors(model.layer(0), layer_prefix(0), at::kBFloat16);
///     for (const auto& [name, tensor] : tensors) writer.add(name, tensor);  // a CheckpointWriter
///
/// @param prefix such as "model.layers.0."
std::map<std::string, Tensor> layer_tensors(const DecoderLayer& layer, const std::string& prefix, at::ScalarType dtype);

}  // namespace baseq

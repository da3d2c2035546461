#pragma once

#include <map>
#include <string>

#include "baseq/model/decoder_layer.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

/// A block between two stages: everything that the stages change, exactly as it is. Of a rounded linear the codes stand
/// for its weight. On the host; a tensor that is there already is not copied.
std::map<std::string, Tensor> layer_state(const DecoderLayer& layer);

/// The block whose state that was: restore_layer(DecoderLayer::create(...), layer_state(layer), ...) computes what
/// `layer` computes, to the last bit.
/// @param layer   as DecoderLayer::create makes it
/// @param recipe  gives the grids
/// @param compute float32, and the device
/// Throws c10::Error naming what is missing in `state`.
DecoderLayer restore_layer(DecoderLayer layer, const std::map<std::string, Tensor>& state, const Recipe& recipe,
                           const at::TensorOptions& compute);

}  // namespace baseq

#pragma once

#include "baseq/model/model.h"

namespace baseq {

/// The tables of RotaryEmbedding::create in float32 for the first `seq_len` positions, with cosines and sines of
/// float64: the same bits whatever the instruction set.
RotaryEmbedding exact_rotary(const RotaryFrequencies& frequencies, int64_t seq_len);

/// What the blocks of model.layer(i, options) take: exact where they compute with integers, else Model::rotary.
RotaryEmbedding rotary_of(const Model& model, int64_t seq_len, const LoadOptions& options);

}  // namespace baseq

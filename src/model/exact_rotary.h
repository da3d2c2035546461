#pragma once

#include "baseq/model/rotary_embedding.h"

namespace baseq {

/// The tables of RotaryEmbedding::create in float32 for the first `seq_len` positions, with cosines and sines of
/// float64: the same bits whatever the instruction set.
RotaryEmbedding exact_rotary(const RotaryFrequencies& frequencies, int64_t seq_len);

}  // namespace baseq

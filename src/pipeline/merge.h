#pragma once

#include "baseq/model/decoder_layer.h"

namespace baseq {

// These hold for every field of DecoderLayer: multipliers commute with them, and sliding windows, the norms of q and k
// and blocks without RoPE touch neither the residual stream nor the values. Fold in float64 for exactness.

/// Moves the gains of both norms into the linears that read them; the norms are left with gain 1.
void fuse_norm_gains(DecoderLayer& layer);

/// The residual stream becomes `x T` (QuaRot, arXiv 2404.00456): inputs of q, k, v, gate and up, outputs of o and down.
/// @param transform orthogonal; the norms must have gain 1
void transform_residual(DecoderLayer& layer, const Transform& transform);

/// After the last step: W * shift moves into the biases of the readers, and gains after a norm into its weight.
void merge_corrections(DecoderLayer& layer);

}  // namespace baseq

#pragma once

#include "baseq/model/decoder_layer.h"
#include "baseq/pipeline/recipe.h"

namespace baseq {

/// Transforms folded into the weights of one block. Each keeps what the block computes, up to the basis of the residual
/// stream that rotate_residual changes; fold in float64 for exactness. Row vectors: `x T` enters where `x` did.
///
/// They hold for every field of DecoderLayer: multipliers commute with them, and a sliding window, the norms of q and k
/// and blocks without RoPE touch neither the residual stream nor the values.

/// Moves the gains of both norms into the linears that read them; the norms are left with gain 1.
void fuse_norm_gains(DecoderLayer& layer);

/// The residual stream becomes `x H` (QuaRot, arXiv 2404.00456): inputs of q, k, v, gate and up, outputs of o and down.
/// The norms must have gain 1.
void rotate_residual(DecoderLayer& layer);

/// The values of every key/value head become `v T`: the outputs of v_proj and the inputs of o_proj.
/// @param matrices           T, [num_kv_heads, head_dim, head_dim], invertible
/// @param inverse_transposes T^{-T}, the same shape (T itself when orthogonal)
void transform_values(DecoderLayer& layer, const Tensor& matrices, const Tensor& inverse_transposes);

/// transform_values with the Hadamard matrix of head_dim.
void rotate_values(DecoderLayer& layer);

/// Appends a factor to the online transform of a site and its inverse transpose to the weights of the readers. At
/// kQueryKey, where nothing is merged: a rotation of the rows of q_proj and k_proj would have to pass RoPE and, where
/// there are norms on q and k, their weights.
void transform_online(DecoderLayer& layer, Site site, const Factor& factor);

/// Moves Mlp::down_scale into the rows of up_proj.
void merge_down_scale(DecoderLayer& layer);

/// The recipe's merged and online Hadamard transforms behind the residual stream, in this order: values, q and k, the
/// inputs of o and down, the norms' outputs.
void apply_hadamards(DecoderLayer& layer, const Recipe::Transforms& transforms);

/// Leaves to inference what cannot be merged: gains behind a norm move into its weight, and `W shift` into the biases
/// of the linears that read a point, which then only subtracts.
void merge_corrections(DecoderLayer& layer);

}  // namespace baseq

#pragma once

#include <cstdint>

#include "baseq/tensor.h"

namespace baseq {

// DuQuant, arXiv 2406.01721: rotations that spread the channels with the largest values, and a permutation between.

/// Orthogonal matrices of blocks of channels, one after the other. Each step swaps the channel with the largest
/// magnitude of a block to the front and multiplies the block by a random orthogonal matrix whose first row has equal
/// entries; each block keeps the step at which its largest magnitude is least, the start included.
/// @param x          [tokens, n], floating point and finite; n a multiple of block_size
/// @param num_steps  256 as published
/// @return           float64 [n / block_size, block_size, block_size] on the device of x
/// Throws c10::Error for other shapes.
Tensor greedy_rotation(const Tensor& x, int64_t block_size, int64_t num_steps, uint64_t seed);

/// A permutation for permutation_factor(): channels in order of falling `magnitudes` go to the blocks in turn, forwards
/// and backwards, so that each block gets its share of the loud ones.
/// @param magnitudes [n], n a multiple of block_size
/// @return           int64 [n]
Tensor zigzag_permutation(const Tensor& magnitudes, int64_t block_size);

}  // namespace baseq

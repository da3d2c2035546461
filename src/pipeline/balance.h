#pragma once

#include <map>
#include <vector>

#include "baseq/model/decoder_layer.h"
#include "pipeline/activations.h"

namespace baseq {

/// The result of balance().
struct Balanced {
  std::map<Site, Factor> factors;  ///< a site that nothing decides, such as one in front of zeros, has none
  std::vector<Site> left_out;      ///< their moments are not finite
};

/// Transforms in closed form, for the start of a chain: nothing may stand at these sites yet.
///
/// A grid with one scale per token spreads its rounding error evenly over the channels that a Hadamard transform mixes:
/// the error of y = x W^T is proportional to (sum_j s_j^2 a_j^2) (sum_j w_j^2 / s_j^2), a_j^2 the variance of input
/// channel j and w_j^2 the energy of its weight column. By Cauchy-Schwarz it is least at s_j^4 = w_j^2 / a_j^2, and the
/// same product bounds the error of a weight grid with one scale per row.
/// - qkv, gate_up, down: the scale s;
/// - query_key: s for k and 1/s for q, equal within a rotary pair, with which a scale commutes. A norm on q and k takes
///   a scale of its input back, so there s is the same for all heads and moves into the weights of the norms;
/// - value: an invertible matrix T per key/value head. With C the covariance of what o_proj reads of the head and
///   B = W_o^T W_o, tr(T^T C T) tr(T^-1 B T^-T) is least where T T^T is the geometric mean of C^-1 and B.
/// @param weights of the tokens, see token_weights()
/// Throws c10::Error for another site.
Balanced balance(const DecoderLayer& layer, const std::vector<Site>& at, const BlockInputs& inputs,
                 const Tensor& weights);

/// The geometric mean A # B of symmetric positive definite matrices [.., n, n], float64: the positive definite
/// solution X of X A^-1 X = B.
Tensor geometric_mean(const Tensor& a, const Tensor& b);

}  // namespace baseq

#pragma once

#include <string>
#include <vector>

#include "baseq/pipeline/recipe.h"
#include "baseq/pipeline/round_layer.h"

namespace baseq {

/// Paired transforms in closed form, merged into the weights of `layer` before any Hadamard transform.
///
/// A grid with one scale a token spreads its rounding error evenly over the channels that a Hadamard transform mixes:
/// the error of y = x W^T is proportional to (sum_j s_j^2 a_j^2) (sum_j w_j^2 / s_j^2), a_j^2 the variance of input
/// channel j and w_j^2 the energy of its weight column. By Cauchy-Schwarz it is least at s_j^4 = w_j^2 / a_j^2, and the
/// same product bounds the error of a weight grid with one scale a row.
/// - scale_norm: s in the norm's weight, 1/s in its readers;
/// - scale_down: s in up_proj's rows, 1/s in down_proj's columns;
/// - scale_query_key: s in k's rows, 1/s in q's, equal within a rotary pair, with which a scale commutes. A norm on q
///   and k takes a scale of its input back, so there s is in the weights of the norms, the same for all heads;
/// - scale_value: an invertible matrix T a key/value head. With C the covariance of what o_proj reads of the head and
///   B = W_o^T W_o, tr(T^T C T) tr(T^-1 B T^-T) is least where T T^T is the geometric mean of C^-1 and B.
/// Where nothing decides, as for a projection of zeros, the transform is the identity.
/// @param weights of the tokens, see token_weights
/// @return the transforms that were left out because moments of the inputs are not finite, for a message
std::vector<std::string> balance(DecoderLayer& layer, const Recipe::Transforms& transforms, const BlockInputs& inputs,
                                 const Tensor& weights);

/// The geometric mean A # B of symmetric positive definite matrices [.., n, n], float64: the positive definite
/// solution X of X A^-1 X = B.
Tensor geometric_mean(const Tensor& a, const Tensor& b);

}  // namespace baseq

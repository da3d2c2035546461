#pragma once

#include <span>
#include <string_view>

#include "parameters.h"

namespace baseq {

/// A way in which a learn step can move a factor of a transform.
struct TransformLeaf {
  std::string_view what;  ///< of a rate "<site>.<what>"
  Factor::Kind kind;      ///< the last factor of this kind is moved
  /// The parameter at the values of `factor`, which is of the transform at `site`; without a name and a rate.
  Parameter (*make)(Site site, const Factor& factor);
};

/// All ways:
/// - scale: logarithms of a scale;
/// - matrix: a rotation by a Cayley map before the matrix, which keeps its singular values;
/// - svd: both rotations and the logarithms of the singular values of a matrix, FlatQuant's form (arXiv 2410.09426), in
///   which the inverse needs no solution of equations;
/// - band: the elements of a matrix themselves, AffineQuant (arXiv 2403.12544): from the diagonal outwards, as epochs
///   pass, and kept strictly diagonally dominant, so that there is an inverse;
/// - kronecker: the svd form of the two matrices of a Kronecker factor, or of the left one alone where there is no
/// other.
std::span<const TransformLeaf> transform_leaves();

/// An orthogonal matrix as itself, which Cayley SGD moves and keeps orthogonal: the way of "matrix" under that rule.
/// Throws c10::Error when the matrix is not known to be orthogonal.
Parameter orthogonal_leaf(Site site, const Factor& factor);

/// AffineQuant's gradual mask, bool [n, n]: true up to floor((n - 1) / (num_epochs - 1) epoch) + 1 places from the
/// diagonal.
Tensor band_mask(int64_t n, int64_t epoch, int64_t num_epochs);

/// `matrices` [.., n, n] with the off-diagonal elements of each row made smaller where their magnitudes add up to 99 %
/// of that of the diagonal or more; differentiable. A strictly diagonally dominant matrix has an inverse.
Tensor diagonally_dominant(const Tensor& matrices);

}  // namespace baseq

#pragma once

#include <vector>

#include "baseq/tensor.h"

#pragma GCC visibility push(default)
namespace baseq {

/// An orthogonal matrix from an unconstrained one by the Cayley map R = (I + A)^-1 (I - A) of the skew A = P - P^T.
/// Zero gives the identity. Differentiable; computed in the dtype of `parameter`.
/// @param parameter  [.., n, n], floating point
/// @return           [.., n, n]
Tensor cayley(const Tensor& parameter);

/// An invertible matrix T [n, n] between a layer's input and its weight: x T (w T^-T)^T = x w^T. A value: after a
/// change of the tensors that it was made from, make it again. Make it with the functions below, which check the sizes.
struct Factor {
  enum class Kind {
    kScale,      ///< diag(left), left [n]
    kHadamard,   ///< `blocks` times hadamard_transform over `block` features along the diagonal, n = blocks * block
    kMatrix,     ///< diag(left[0], .., left[k - 1]), left [k, b, b], n = k b: a matrix per head
    kKronecker,  ///< left (x) right, [p, p] and [q, q], n = p q; left acts on the slow part of the index. An undefined
                 ///< right is the identity of `block` features
    kPermutation,  ///< (x T)[.., j] = x[.., left[j]], left int64 [n]
  };
  Kind kind = Kind::kHadamard;
  Tensor left{}, right{};
  Tensor left_inverse{}, right_inverse{};  ///< undefined: that part is orthogonal
  int64_t block = 1, blocks = 1;           ///< of kHadamard; block: of kKronecker without right

  int64_t size() const;  ///< n
  /// Whether T^-T is known to be T.
  bool orthogonal() const { return !left_inverse.defined() && !right_inverse.defined(); }
  /// Indices of a permutation keep their dtype.
  Factor to(const at::TensorOptions& options) const;
  /// Cut from the autograd graph.
  Factor detach() const;
};

/// "scale", "hadamard", "matrix", "kronecker" or "permutation".
const char* kind_name(Factor::Kind kind);

/// T = T_1 T_2 ... T_k of one size: the first factor is applied first. Empty: the identity.
///
///     const Transform transform = {scale_factor(scale), hadamard_factor(hadamard_block_size(n))};
///     const Tensor y = at::mm(apply_transform(transform, x), apply_inverse_transpose(transform, w).t());  // x w^T
using Transform = std::vector<Factor>;

// An inverse that is not given is computed. All throw c10::Error for shapes and dtypes other than those of Factor and
// for what has no inverse.

Factor scale_factor(const Tensor& scale, const Tensor& inverse = {});
/// QuaRot, arXiv 2404.00456.
Factor hadamard_factor(int64_t block, int64_t blocks = 1);
/// @param matrices [k, b, b], or [b, b] for k = 1
Factor matrix_factor(const Tensor& matrices, const Tensor& inverses = {});
/// matrix_factor of matrices that are orthogonal, such as those of `cayley`; this is not checked.
Factor rotation_factor(const Tensor& matrices);
/// FlatQuant, arXiv 2410.09426.
Factor kronecker_factor(const Tensor& left, const Tensor& right, const Tensor& left_inverse = {},
                        const Tensor& right_inverse = {});
/// left (x) identity: FlatQuant's transform of heads, which leaves the `features` of each as they are.
Factor left_kronecker_factor(const Tensor& left, int64_t features, const Tensor& left_inverse = {});
/// @param permutation int64 [n], each of 0 .. n-1 once
Factor permutation_factor(const Tensor& permutation);

/// x [.., n] -> x T, in the dtype of x: float32 factors can transform bfloat16 activations. Differentiable in x and in
/// the tensors of the factors. Throws c10::Error when the last dimension of x is not the size of every factor.
Tensor apply_transform(const Transform& transform, const Tensor& x);
/// w [out, n] -> w T^-T; else as above.
Tensor apply_inverse_transpose(const Transform& transform, const Tensor& w);
/// w [out, n] -> w T^T, which gives for x what w gives for x T; needs no inverses; else as above.
Tensor apply_transpose(const Transform& transform, const Tensor& w);

}  // namespace baseq
#pragma GCC visibility pop

#pragma once

#include <memory>
#include <vector>

#include "baseq/tensor.h"

namespace baseq {

/// An orthogonal matrix from an unconstrained one by the Cayley map R = (I + A)^-1 (I - A) of the skew A = P - P^T.
/// Zero gives the identity. Differentiable; computed in the dtype of `parameter`.
/// @param parameter  [.., n, n], floating point
/// @return           [.., n, n]
Tensor cayley(const Tensor& parameter);

/// An invertible matrix T [n, n] that stands between a layer's input and its weight and leaves the output as it is:
/// apply(x) apply_inverse_transpose(w)^T = x T (w T^-T)^T = x w^T.
///
/// Everything is differentiable in its argument and in parameters(). T is cast to the dtype of the argument, so float32
/// parameters can transform bfloat16 activations. Every function throws c10::Error when the last dimension of its
/// argument is not size().
class Transform {
 public:
  virtual ~Transform() = default;

  virtual int64_t size() const = 0;

  /// x [.., n] -> x T
  virtual Tensor apply(const Tensor& x) const = 0;

  /// w [out, n] -> w T^-T
  virtual Tensor apply_inverse_transpose(const Tensor& w) const = 0;

  /// The tensors that may be learned, as handles: setting requires_grad on them or updating them in place takes effect.
  virtual std::vector<Tensor> parameters() const { return {}; }

 protected:
  Transform() = default;
  Transform(const Transform&) = default;
  Transform& operator=(const Transform&) = default;
};

/// T = diag(s), s [n] without zeros (SmoothQuant, arXiv 2211.10438, divides activations: its s is 1 / s here).
class ScaleTransform : public Transform {
 public:
  explicit ScaleTransform(Tensor scale);
  int64_t size() const override;
  Tensor apply(const Tensor& x) const override;
  Tensor apply_inverse_transpose(const Tensor& w) const override;
  std::vector<Tensor> parameters() const override { return {scale_}; }

 private:
  Tensor scale_;
};

/// T = hadamard_matrix(n), or its block-diagonal fallback; orthogonal and fixed (QuaRot, arXiv 2404.00456).
class HadamardTransform : public Transform {
 public:
  explicit HadamardTransform(int64_t size);
  int64_t size() const override { return size_; }
  Tensor apply(const Tensor& x) const override;
  Tensor apply_inverse_transpose(const Tensor& w) const override;

 private:
  int64_t size_;
};

/// T = cayley(parameter), a learned rotation (SpinQuant, arXiv 2405.16406). A parameter [k, m, m] stands for k
/// rotations along the diagonal, n = k m: one per head.
class OrthogonalTransform : public Transform {
 public:
  explicit OrthogonalTransform(Tensor parameter);
  int64_t size() const override;
  Tensor apply(const Tensor& x) const override;
  Tensor apply_inverse_transpose(const Tensor& w) const override;
  std::vector<Tensor> parameters() const override { return {parameter_}; }

 private:
  Tensor parameter_;
};

/// T = left (x) right, both invertible, n = a b (FlatQuant, arXiv 2410.09426).
/// @param left   [a, a], acts on the slow part of the index
/// @param right  [b, b], acts on the fast part
class KroneckerTransform : public Transform {
 public:
  KroneckerTransform(Tensor left, Tensor right);
  int64_t size() const override;
  Tensor apply(const Tensor& x) const override;
  Tensor apply_inverse_transpose(const Tensor& w) const override;
  std::vector<Tensor> parameters() const override { return {left_, right_}; }

 private:
  Tensor left_, right_;
};

/// T = diag(M_1, ..., M_k), each M invertible, n = k b: a matrix per head.
/// @param matrices  [k, b, b]
class BlockDiagonalTransform : public Transform {
 public:
  explicit BlockDiagonalTransform(Tensor matrices);
  int64_t size() const override;
  Tensor apply(const Tensor& x) const override;
  Tensor apply_inverse_transpose(const Tensor& w) const override;
  std::vector<Tensor> parameters() const override { return {matrices_}; }

 private:
  Tensor matrices_;
};

/// (x T)[.., j] = x[.., permutation[j]].
/// @param permutation  int64 [n], each of 0 .. n-1 once
class PermutationTransform : public Transform {
 public:
  explicit PermutationTransform(Tensor permutation);
  int64_t size() const override;
  Tensor apply(const Tensor& x) const override;
  Tensor apply_inverse_transpose(const Tensor& w) const override;

 private:
  Tensor permutation_;
};

/// T = T_1 T_2 ... T_k: the first transform is applied first. At least one, all of the same size.
class ComposedTransform : public Transform {
 public:
  explicit ComposedTransform(std::vector<std::shared_ptr<const Transform>> transforms);
  int64_t size() const override;
  Tensor apply(const Tensor& x) const override;
  Tensor apply_inverse_transpose(const Tensor& w) const override;
  std::vector<Tensor> parameters() const override;

 private:
  std::vector<std::shared_ptr<const Transform>> transforms_;
};

}  // namespace baseq

#include "exact_transform.h"

#include <ATen/ATen.h>

#include "../integer/float_linear.h"
#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

/// Rows times a matrix, [rows, n] and [n, n].
Tensor times_matrix(const Tensor& rows, const Tensor& matrix) {
  return FloatLinear(matrix.t().to(at::kFloat)).forward(rows.contiguous());
}

/// What takes the place of `part` in T^-T; a scale is a vector.
Tensor in_place_of(const Tensor& part, const Tensor& inverse, bool inverse_transpose) {
  if (!inverse_transpose || !inverse.defined()) return part;
  return inverse.dim() == 1 ? inverse : inverse.mT();
}

Tensor times_blocks(const Tensor& x, const Tensor& matrices) {
  const int64_t count = matrices.size(0), size = matrices.size(1);
  const Tensor blocks = x.reshape({-1, count, size});
  std::vector<Tensor> parts;
  for (int64_t i = 0; i < count; ++i) parts.push_back(times_matrix(blocks.select(1, i), matrices[i]));
  return at::stack(parts, 1).view(x.sizes());
}

/// @param right undefined: the identity
Tensor times_kronecker(const Tensor& x, const Tensor& left, const Tensor& right) {
  const int64_t p = left.size(0), q = x.size(-1) / p;
  const Tensor rows = right.defined() ? times_matrix(x.reshape({-1, q}), right) : x;
  const Tensor columns = times_matrix(rows.reshape({-1, p, q}).transpose(1, 2).reshape({-1, p}), left);
  return columns.view({-1, q, p}).transpose(1, 2).reshape(x.sizes());
}

}  // namespace

Tensor exact_transform(const Transform& transform, const Tensor& x, bool inverse_transpose) {
  Tensor y = x;
  for (const Factor& factor : transform) {
    const Tensor left = in_place_of(factor.left, factor.left_inverse, inverse_transpose);
    switch (factor.kind) {
      case Factor::Kind::kScale:
        y = y * left;
        break;
      case Factor::Kind::kHadamard:
        y = factor.blocks == 1 ? hadamard_transform(y)
                               : hadamard_transform(y.unflatten(-1, {factor.blocks, factor.block})).flatten(-2);
        break;
      case Factor::Kind::kMatrix:
        y = times_blocks(y, left);
        break;
      case Factor::Kind::kKronecker:
        y = times_kronecker(y, left, in_place_of(factor.right, factor.right_inverse, inverse_transpose));
        break;
      case Factor::Kind::kPermutation:
        y = y.index_select(-1, factor.left);
        break;
    }
  }
  return y;
}

}  // namespace baseq

#include "baseq/transform/transform.h"

#include <ATen/ATen.h>

#include <limits>

#include "baseq/transform/hadamard.h"

namespace baseq {
namespace {

void check_square(const char* who, const Tensor& matrix, int64_t min_dim, int64_t max_dim) {
  TORCH_CHECK(matrix.defined() && at::isFloatingType(matrix.scalar_type()) && matrix.dim() >= min_dim &&
                  matrix.dim() <= max_dim && matrix.size(-1) == matrix.size(-2) && matrix.numel() > 0,
              who, ": got ", matrix.toString(), " ", matrix.defined() ? matrix.sizes() : at::IntArrayRef(),
              " but floating-point square matrices of ", min_dim, " to ", max_dim, " dimensions are needed");
}

/// `given`, or computed where that is undefined.
Tensor inverse_of(const char* who, const Tensor& matrix, const Tensor& given) {
  if (!given.defined()) return at::linalg_inv(matrix).contiguous();
  check_square(who, given, matrix.dim(), matrix.dim());
  TORCH_CHECK(given.sizes() == matrix.sizes(), who, ": the inverse is ", given.sizes(), " but the matrix is ",
              matrix.sizes());
  return given.contiguous();
}

/// [b, b] -> [1, b, b]
Tensor in_blocks(const Tensor& matrices) {
  return (matrices.dim() == 2 ? matrices.unsqueeze(0) : matrices).contiguous();
}

/// x [.., k b] times diag(matrices), matrices [k, b, b].
Tensor times_blocks(const Tensor& x, const Tensor& matrices) {
  if (matrices.size(0) == 1) return at::matmul(x, matrices[0]);
  const Tensor columns = x.reshape({-1, matrices.size(0), matrices.size(1)}).transpose(0, 1);  // [k, rows, b]
  return at::bmm(columns, matrices).transpose(0, 1).reshape(x.sizes());
}

/// x [.., p q] times left (x) right.
Tensor times_kronecker(const Tensor& x, const Factor& factor) {
  const Tensor left = factor.left.to(x.scalar_type());
  Tensor grid = x.reshape({-1, left.size(0), factor.size() / left.size(0)});
  if (factor.right.defined()) grid = at::matmul(grid, factor.right.to(x.scalar_type()));
  return at::matmul(left.t(), grid).reshape(x.sizes());
}

Tensor times_hadamard(const Tensor& x, const Factor& factor, bool transpose) {
  if (factor.blocks == 1) return hadamard_transform(x, transpose);
  return hadamard_transform(x.unflatten(-1, {factor.blocks, factor.block}), transpose).flatten(-2);
}

Tensor times(const Tensor& x, const Factor& factor) {
  const at::ScalarType dtype = x.scalar_type();
  switch (factor.kind) {
    case Factor::Kind::kScale:
      return x * factor.left.to(dtype);
    case Factor::Kind::kHadamard:
      return times_hadamard(x, factor, /*transpose=*/false);
    case Factor::Kind::kMatrix:
      return times_blocks(x, factor.left.to(dtype));
    case Factor::Kind::kKronecker:
      return times_kronecker(x, factor);
    case Factor::Kind::kPermutation:
      return x.index_select(-1, factor.left);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown Factor::Kind");
}

/// x T^T
Tensor times_transpose(const Tensor& x, Factor factor) {
  switch (factor.kind) {
    case Factor::Kind::kScale:
      break;
    case Factor::Kind::kHadamard:
      return times_hadamard(x, factor, /*transpose=*/true);
    case Factor::Kind::kMatrix:
      factor.left = factor.left.mT();
      break;
    case Factor::Kind::kKronecker:
      factor.left = factor.left.mT();
      if (factor.right.defined()) factor.right = factor.right.mT();
      break;
    case Factor::Kind::kPermutation:
      factor.left = factor.left.argsort();
      break;
  }
  return times(x, factor);
}

/// fn applied to every tensor that is there.
template <class Fn>
Factor mapped(Factor factor, Fn&& fn) {
  for (Tensor* part : {&factor.left, &factor.right, &factor.left_inverse, &factor.right_inverse}) {
    if (part->defined()) *part = fn(*part);
  }
  return factor;
}

/// T^-T as a factor.
Factor inverse_transpose(Factor factor) {
  const auto part = [&](Tensor& matrix, const Tensor& inverse) {
    if (inverse.defined()) matrix = factor.kind == Factor::Kind::kScale ? inverse : inverse.mT();
  };
  part(factor.left, factor.left_inverse);
  part(factor.right, factor.right_inverse);
  return factor;
}

void check_size(const Factor& factor, const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == factor.size(), "transform: the argument is ", x.sizes(),
              " but a factor is of size ", factor.size());
}

}  // namespace

Tensor cayley(const Tensor& parameter) {
  check_square("cayley", parameter, 2, std::numeric_limits<int64_t>::max());
  const Tensor skew = parameter - parameter.mT();
  const Tensor identity = at::eye(parameter.size(-1), parameter.options().requires_grad(false));
  return at::linalg_solve(identity + skew, identity - skew);
}

const char* kind_name(Factor::Kind kind) {
  switch (kind) {
    case Factor::Kind::kScale:
      return "scale";
    case Factor::Kind::kHadamard:
      return "hadamard";
    case Factor::Kind::kMatrix:
      return "matrix";
    case Factor::Kind::kKronecker:
      return "kronecker";
    case Factor::Kind::kPermutation:
      return "permutation";
  }
  TORCH_INTERNAL_ASSERT(false, "unknown Factor::Kind");
}

int64_t Factor::size() const {
  switch (kind) {
    case Kind::kScale:
    case Kind::kPermutation:
      return left.size(0);
    case Kind::kHadamard:
      return block * blocks;
    case Kind::kMatrix:
      return left.size(0) * left.size(1);
    case Kind::kKronecker:
      return left.size(0) * (right.defined() ? right.size(0) : block);
  }
  TORCH_INTERNAL_ASSERT(false, "unknown Factor::Kind");
}

Factor Factor::to(const at::TensorOptions& options) const {
  const at::TensorOptions target = kind == Kind::kPermutation ? options.dtype(at::kLong) : options;
  return mapped(*this, [&](const Tensor& part) { return part.to(target); });
}

Factor Factor::detach() const {
  return mapped(*this, [](const Tensor& part) { return part.detach(); });
}

Factor scale_factor(const Tensor& scale, const Tensor& inverse) {
  TORCH_CHECK(scale.defined() && scale.dim() == 1 && scale.numel() > 0 && at::isFloatingType(scale.scalar_type()),
              "scale_factor: the scale is ", scale.toString(), " ", scale.defined() ? scale.sizes() : at::IntArrayRef(),
              " but a floating-point vector is needed");
  if (inverse.defined()) {
    TORCH_CHECK(inverse.sizes() == scale.sizes() && at::isFloatingType(inverse.scalar_type()),
                "scale_factor: the inverse is ", inverse.toString(), " ", inverse.sizes(), " but the scale is ",
                scale.sizes());
    return {.kind = Factor::Kind::kScale, .left = scale, .left_inverse = inverse};
  }
  const Tensor reciprocal = scale.reciprocal();
  TORCH_CHECK((scale.isfinite() & reciprocal.isfinite()).all().item<bool>(),
              "scale_factor: the scale has entries without an inverse: zero, infinite or NaN");
  return {.kind = Factor::Kind::kScale, .left = scale, .left_inverse = reciprocal};
}

Factor hadamard_factor(int64_t block, int64_t blocks) {
  TORCH_CHECK(block >= 1 && blocks >= 1 && block <= std::numeric_limits<int64_t>::max() / blocks,
              "hadamard_factor: ", blocks, " blocks of ", block,
              " features, but both must be at least 1 and their product fit an int64");
  return {.kind = Factor::Kind::kHadamard, .block = block, .blocks = blocks};
}

Factor matrix_factor(const Tensor& matrices, const Tensor& inverses) {
  check_square("matrix_factor", matrices, 2, 3);
  return {.kind = Factor::Kind::kMatrix,
          .left = in_blocks(matrices),
          .left_inverse = in_blocks(inverse_of("matrix_factor", matrices, inverses))};
}

Factor rotation_factor(const Tensor& matrices) {
  check_square("rotation_factor", matrices, 2, 3);
  return {.kind = Factor::Kind::kMatrix, .left = in_blocks(matrices)};
}

Factor kronecker_factor(const Tensor& left, const Tensor& right, const Tensor& left_inverse,
                        const Tensor& right_inverse) {
  check_square("kronecker_factor", left, 2, 2);
  check_square("kronecker_factor", right, 2, 2);
  return {.kind = Factor::Kind::kKronecker,
          .left = left.contiguous(),
          .right = right.contiguous(),
          .left_inverse = inverse_of("kronecker_factor", left, left_inverse),
          .right_inverse = inverse_of("kronecker_factor", right, right_inverse)};
}

Factor left_kronecker_factor(const Tensor& left, int64_t features, const Tensor& left_inverse) {
  check_square("left_kronecker_factor", left, 2, 2);
  TORCH_CHECK(features >= 1 && features <= std::numeric_limits<int64_t>::max() / left.size(0),
              "left_kronecker_factor: ", features, " features of each of the ", left.size(0),
              ", but at least 1 is needed and their product must fit an int64");
  return {.kind = Factor::Kind::kKronecker,
          .left = left.contiguous(),
          .left_inverse = inverse_of("left_kronecker_factor", left, left_inverse),
          .block = features};
}

Factor permutation_factor(const Tensor& permutation) {
  TORCH_CHECK(permutation.defined() && permutation.dim() == 1 && permutation.scalar_type() == at::kLong &&
                  permutation.numel() > 0 &&
                  at::equal(std::get<0>(permutation.sort()), at::arange(permutation.size(0), permutation.options())),
              "permutation_factor: got ", permutation.toString(), " ",
              permutation.defined() ? permutation.sizes() : at::IntArrayRef(),
              " but an int64 vector with each of 0 .. n-1 once is needed");
  return {.kind = Factor::Kind::kPermutation, .left = permutation};
}

Tensor apply_transform(const Transform& transform, const Tensor& x) {
  Tensor y = x;
  for (const Factor& factor : transform) {
    check_size(factor, y);
    y = times(y, factor);
  }
  return y;
}

// (T_1 T_2)^-T = T_1^-T T_2^-T: the order is the same.
Tensor apply_inverse_transpose(const Transform& transform, const Tensor& w) {
  Tensor y = w;
  for (const Factor& factor : transform) {
    check_size(factor, y);
    y = times(y, inverse_transpose(factor));
  }
  return y;
}

// (T_1 T_2)^T = T_2^T T_1^T.
Tensor apply_transpose(const Transform& transform, const Tensor& w) {
  Tensor y = w;
  for (auto factor = transform.rbegin(); factor != transform.rend(); ++factor) {
    check_size(*factor, y);
    y = times_transpose(y, *factor);
  }
  return y;
}

}  // namespace baseq

#include "transform/greedy_rotation.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "transform/random_rotation.h"

namespace baseq {
namespace {

void check_blocks(const char* who, int64_t features, int64_t block_size) {
  TORCH_CHECK(block_size >= 1 && features >= 1 && features % block_size == 0, who, ": blocks of ", block_size,
              " do not fill ", features, " features");
}

/// An orthogonal matrix whose first row is 1 / sqrt(n) everywhere; the others are random.
Tensor spreading_rotation(int64_t n, uint64_t seed) {
  // The reflection that takes the first unit vector to the constant one.
  Tensor normal = at::full({n}, -1 / std::sqrt(static_cast<double>(n)), at::kDouble);
  normal[0] += 1;
  const double squared = normal.square().sum().item<double>();
  Tensor rotation = at::eye(n, at::kDouble);
  if (squared > 0) rotation = rotation - at::outer(normal, normal) * (2 / squared);
  if (n > 1) rotation.narrow(0, 1, n - 1).copy_(at::matmul(random_rotation(n - 1, seed), rotation.narrow(0, 1, n - 1)));
  return rotation;
}

/// Swaps column `channel[k]` of matrix k with its first one.
Tensor with_first(const Tensor& matrices, const Tensor& channel) {
  const int64_t blocks = matrices.size(0), size = matrices.size(2);
  Tensor order = at::arange(size, channel.options()).repeat({blocks, 1});
  order.scatter_(1, channel.unsqueeze(1), 0);
  order.select(1, 0).copy_(channel);
  return matrices.gather(2, order.unsqueeze(1).expand(matrices.sizes()));
}

}  // namespace

Tensor greedy_rotation(const Tensor& x, int64_t block_size, int64_t num_steps, uint64_t seed) {
  TORCH_CHECK(x.dim() == 2 && at::isFloatingType(x.scalar_type()), "greedy_rotation: x is ", x.toString(), " ",
              x.sizes(), ", expected floating-point [tokens, n]");
  check_blocks("greedy_rotation", x.size(1), block_size);
  const c10::NoGradGuard no_grad;
  Tensor blocks = x.detach().unflatten(1, {-1, block_size}).transpose(0, 1).contiguous();  // [k, tokens, b]
  Tensor rotation = at::eye(block_size, x.options().dtype(at::kDouble)).repeat({blocks.size(0), 1, 1});
  Tensor best = rotation;
  if (x.size(0) == 0) return best;
  Tensor magnitudes = blocks.abs().amax(1), least = magnitudes.amax(1);
  for (int64_t step = 0; step < num_steps; ++step) {
    const Tensor loudest = magnitudes.argmax(1);
    const Tensor spreading =
        spreading_rotation(block_size, derived_seed(seed, static_cast<uint64_t>(step))).to(x.device());
    blocks = at::matmul(with_first(blocks, loudest), spreading.to(blocks.scalar_type()));
    rotation = at::matmul(with_first(rotation, loudest), spreading);
    magnitudes = blocks.abs().amax(1);
    const Tensor largest = magnitudes.amax(1), better = largest.lt(least);
    least = at::where(better, largest, least);
    best = at::where(better.view({-1, 1, 1}), rotation, best);
  }
  return best.contiguous();
}

Tensor zigzag_permutation(const Tensor& magnitudes, int64_t block_size) {
  TORCH_CHECK(magnitudes.dim() == 1, "zigzag_permutation: the magnitudes are ", magnitudes.sizes(), ", expected [n]");
  check_blocks("zigzag_permutation", magnitudes.size(0), block_size);
  const Tensor falling = at::argsort(magnitudes, /*stable=*/true, /*dim=*/0, /*descending=*/true);
  Tensor rounds = falling.view({block_size, -1}).clone();  // each round gives every block one channel
  for (int64_t round = 1; round < block_size; round += 2) rounds[round] = rounds[round].flip(0);
  return rounds.t().reshape({-1}).contiguous();
}

}  // namespace baseq

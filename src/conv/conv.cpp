#include "baseq/conv/conv.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <limits>

#include "exact_product.h"
#include "tiles.h"

namespace baseq {
namespace {

/// Bytes of the transforms and products of the tiles that are worked on at a time.
constexpr int64_t kWorkspace = int64_t{1} << 24;

void check_operands(const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvAlgorithm2d& algorithm) {
  check_filters("conv2d_sfc", weight, bias, x.size(1), algorithm);
  TORCH_CHECK(weight.scalar_type() == x.scalar_type(), "conv2d_sfc: weight is ", weight.scalar_type(), " but x is ",
              x.scalar_type(), "; both have to be float32, float64 or int8");
  TORCH_CHECK(x.device().is_cpu() && weight.device().is_cpu(), "conv2d_sfc: x is on ", x.device(), " and weight on ",
              weight.device(), ", expected the CPU");
  const at::ScalarType result = x.scalar_type() == at::kChar ? at::kInt : x.scalar_type();
  TORCH_CHECK(!bias.defined() || bias.scalar_type() == result, "conv2d_sfc: bias is ", bias.scalar_type(),
              ", expected ", result);
}

Tensor empty_result(const TileGrid& grid, int64_t channels, const Tensor& like, at::ScalarType type) {
  return at::empty({grid.batch, channels, grid.out_height, grid.out_width},
                   like.options().dtype(type).memory_format(at::MemoryFormat::ChannelsLast));
}

template <class T>
Tensor conv_real(const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvAlgorithm2d& algorithm,
                 const TileGrid& grid) {
  const TilePlan plan(algorithm);
  const int64_t in = x.size(1), out_channels = weight.size(0);
  const Tensor filters = transformed_filters(weight, algorithm).transpose(1, 2).to(x.scalar_type());
  Tensor result = empty_result(grid, out_channels, x, x.scalar_type());
  const int64_t block = tiles_per_block(plan, static_cast<int64_t>(sizeof(T)) * (in + out_channels), kWorkspace);
  for (int64_t begin = 0; begin < grid.num_tiles(); begin += block) {
    const int64_t end = std::min(begin + block, grid.num_tiles());
    const Tensor tiles = at::empty({plan.products, end - begin, in}, x.options());
    transform_input(plan, grid, x.const_data_ptr<T>(), begin, end, tiles.mutable_data_ptr<T>());
    const Tensor products = at::bmm(tiles, filters);
    transform_output(plan, grid, out_channels, products.const_data_ptr<T>(), begin, end,
                     bias.defined() ? bias.const_data_ptr<T>() : nullptr, result.mutable_data_ptr<T>());
  }
  return result;
}

template <class Sum>
void conv_exact_into(const Tensor& x, const Tensor& filters, const Tensor& bias, const TilePlan& plan,
                     const TileGrid& grid, at::ScalarType sum_type, Tensor& result) {
  const int64_t in = x.size(1), out_channels = result.size(1);
  const int64_t block = tiles_per_block(plan, 2 * in + static_cast<int64_t>(sizeof(Sum)) * out_channels, kWorkspace);
  for (int64_t begin = 0; begin < grid.num_tiles(); begin += block) {
    const int64_t end = std::min(begin + block, grid.num_tiles());
    const Tensor tiles = at::empty({plan.products, end - begin, in}, x.options().dtype(at::kShort));
    const Tensor products = at::empty({plan.products, end - begin, out_channels}, x.options().dtype(sum_type));
    transform_input(plan, grid, x.const_data_ptr<int8_t>(), begin, end, tiles.mutable_data_ptr<int16_t>());
    exact_products(tiles.const_data_ptr<int16_t>(), filters.const_data_ptr<int16_t>(), plan.products, end - begin,
                   out_channels, in, products.mutable_data_ptr<Sum>());
    transform_output(plan, grid, out_channels, products.const_data_ptr<Sum>(), begin, end,
                     bias.defined() ? bias.const_data_ptr<int32_t>() : nullptr, result.mutable_data_ptr<int32_t>());
  }
}

/// The largest magnitude that a transform gives int8 values.
int64_t largest_transformed(const Tensor& matrix) { return matrix.abs().sum(1).max().item<int64_t>() * 128; }

Tensor conv_exact(const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvAlgorithm2d& algorithm,
                  const TileGrid& grid) {
  constexpr int64_t kInt16 = std::numeric_limits<int16_t>::max(), kInt32 = std::numeric_limits<int32_t>::max();
  const int64_t largest_input = largest_transformed(algorithm.input_matrix());
  const int64_t largest_filter = largest_transformed(algorithm.filter_matrix());
  TORCH_CHECK(largest_input <= kInt16 && largest_filter <= kInt16, "conv2d_sfc: int8 values transform to as much as ",
              largest_input, " and weights to ", largest_filter, ", expected at most ", kInt16,
              "; take an SFC algorithm for exact integers");
  // Whatever the activations, an output stays within this.
  const int64_t largest_output = weight.to(at::kLong).abs().sum({1, 2, 3}).max().item<int64_t>() * 128;
  TORCH_CHECK(largest_output <= kInt32, "conv2d_sfc: weights allow an output of ", largest_output,
              ", expected at most ", kInt32, "; split the input channels");
  const TilePlan plan(algorithm);
  const Tensor filters = transformed_filters(weight, algorithm).to(at::kShort).contiguous();
  Tensor result = empty_result(grid, weight.size(0), x, at::kInt);
  if (largest_output * plan.divisor <= kInt32) {
    conv_exact_into<int32_t>(x, filters, bias, plan, grid, at::kInt, result);
  } else {
    conv_exact_into<int64_t>(x, filters, bias, plan, grid, at::kLong, result);
  }
  return result;
}

}  // namespace

Tensor conv2d_sfc(const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvAlgorithm2d& algorithm,
                  const Padding& padding) {
  const at::NoGradGuard no_grad;
  const TileGrid grid = tile_grid("conv2d_sfc", x, algorithm, padding);
  check_operands(x, weight, bias, algorithm);
  const Tensor last = x.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor offset = bias.defined() ? bias.contiguous() : bias;
  switch (x.scalar_type()) {
    case at::kFloat:
      return conv_real<float>(last, weight, offset, algorithm, grid);
    case at::kDouble:
      return conv_real<double>(last, weight, offset, algorithm, grid);
    case at::kChar:
      return conv_exact(last, weight, offset, algorithm, grid);
    default:
      TORCH_CHECK(false, "conv2d_sfc: x is ", x.scalar_type(), ", expected float32, float64 or int8");
  }
}

Tensor conv1d_sfc(const Tensor& x, const Tensor& weight, const Tensor& bias, const ConvAlgorithm& algorithm,
                  const Padding& padding) {
  TORCH_CHECK(x.dim() == 3 && weight.dim() == 3, "conv1d_sfc: x is ", x.sizes(), " and weight ", weight.sizes(),
              ", expected [batch, in_channels, length] and [out_channels, in_channels, taps]");
  TORCH_CHECK(padding.top == 0 && padding.bottom == 0, "conv1d_sfc: padding has ", padding.top, " at the top and ",
              padding.bottom, " at the bottom, expected it left and right only");
  const ConvAlgorithm2d tiles = tile_algorithm(direct_algorithm(1), algorithm);
  return conv2d_sfc(x.unsqueeze(2), weight.unsqueeze(2), bias, tiles, padding).squeeze(2);
}

}  // namespace baseq

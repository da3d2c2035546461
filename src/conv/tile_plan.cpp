#include <ATen/ATen.h>

#include <algorithm>

#include "tiles.h"

namespace baseq {
namespace {

SparseRows sparse_rows(const Tensor& matrix) {
  SparseRows result;
  if (!matrix.defined()) return {{0}, {}, {}};
  const auto entries = matrix.accessor<int64_t, 2>();
  for (int64_t row = 0; row < matrix.size(0); ++row) {
    result.begin.push_back(static_cast<int32_t>(result.column.size()));
    for (int64_t column = 0; column < matrix.size(1); ++column) {
      if (entries[row][column] == 0) continue;
      result.column.push_back(static_cast<int32_t>(column));
      result.value.push_back(static_cast<int32_t>(entries[row][column]));
    }
  }
  result.begin.push_back(static_cast<int32_t>(result.column.size()));
  return result;
}

/// The first sample of the circle of `points`, or -1 when the algorithm does not begin with the products of one.
int64_t circle_window(const ConvAlgorithm& algorithm, int64_t points) {
  const ConvAlgorithm circle = sfc_algorithm(points, points, 1);
  const Tensor& input = algorithm.input_transform;
  if (input.size(0) < circle.num_products()) return -1;
  for (int64_t window = 0; window + points <= input.size(1); ++window) {
    const Tensor embedded = at::constant_pad_nd(circle.input_transform, {window, input.size(1) - points - window});
    if (!at::equal(embedded, input.slice(0, 0, circle.num_products()))) continue;
    for (int64_t k = 0; k < algorithm.outputs; ++k) {
      const Tensor row = algorithm.output_transform[k];
      const int64_t place = ((k - window) % points + points) % points;
      const Tensor rest = row.slice(0, circle.num_products());
      if (!at::equal(row.slice(0, 0, circle.num_products()), circle.output_transform[place])) return -1;
      if (!((rest == 0) | (rest == points)).all().item<bool>()) return -1;
    }
    return window;
  }
  return -1;
}

}  // namespace

AxisPlan::AxisPlan(const ConvAlgorithm& algorithm)
    : inputs(algorithm.num_inputs()), products(algorithm.num_products()), outputs(algorithm.outputs) {
  if (algorithm.points == 4 || algorithm.points == 6) window = circle_window(algorithm, algorithm.points);
  if ((algorithm.points == 4 || algorithm.points == 6) && window >= 0) {
    circle = algorithm.points;
    circle_products = sfc_algorithm(circle, circle, 1).num_products();
    for (int64_t k = 0; k < outputs; ++k) {
      place.push_back(static_cast<int32_t>(((k - window) % circle + circle) % circle));
    }
  }
  input = sparse_rows(algorithm.input_transform.slice(0, circle_products));
  Tensor outside = algorithm.output_transform.clone();
  outside.slice(1, 0, circle_products).zero_();
  output = sparse_rows(outside);
}

TilePlan::TilePlan(const ConvAlgorithm2d& algorithm)
    : rows(algorithm.rows),
      cols(algorithm.cols),
      input_mix(sparse_rows(algorithm.input_mix)),
      output_mix(sparse_rows(algorithm.output_mix)),
      products(algorithm.num_products()),
      divisor(algorithm.divisor) {}

TileGrid tile_grid(const char* who, const Tensor& x, const ConvAlgorithm2d& algorithm, const Padding& padding) {
  TORCH_CHECK(x.dim() == 4, who, ": x is ", x.sizes(), ", expected [batch, in_channels, height, width]");
  TORCH_CHECK(std::min({padding.top, padding.bottom, padding.left, padding.right}) >= 0, who, ": padding is ",
              padding.top, ", ", padding.bottom, ", ", padding.left, ", ", padding.right, ", expected none below zero");
  TileGrid grid{.batch = x.size(0), .channels = x.size(1), .height = x.size(2), .width = x.size(3)};
  grid.top = padding.top;
  grid.left = padding.left;
  grid.out_height = grid.height + padding.top + padding.bottom - algorithm.rows.taps + 1;
  grid.out_width = grid.width + padding.left + padding.right - algorithm.cols.taps + 1;
  TORCH_CHECK(x.numel() > 0 && grid.out_height > 0 && grid.out_width > 0, who, ": x of ", x.sizes(),
              " with its padding is empty or smaller than the kernel of ", algorithm.rows.taps, " x ",
              algorithm.cols.taps);
  grid.tiles_down = (grid.out_height + algorithm.rows.outputs - 1) / algorithm.rows.outputs;
  grid.tiles_across = (grid.out_width + algorithm.cols.outputs - 1) / algorithm.cols.outputs;
  return grid;
}

void check_filters(const char* who, const Tensor& weight, const Tensor& bias, int64_t in_channels,
                   const ConvAlgorithm2d& algorithm) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) == in_channels &&
                  weight.size(2) == algorithm.rows.taps && weight.size(3) == algorithm.cols.taps,
              who, ": weight is ", weight.sizes(), ", expected [out_channels, ", in_channels, ", ", algorithm.rows.taps,
              ", ", algorithm.cols.taps, "] for this input and algorithm");
  TORCH_CHECK(!bias.defined() || (bias.dim() == 1 && bias.size(0) == weight.size(0)), who, ": bias is ",
              bias.defined() ? bias.sizes() : at::IntArrayRef{}, ", expected [", weight.size(0), "]");
}

Tensor transformed_filters(const Tensor& weight, const ConvAlgorithm2d& algorithm) {
  const Tensor taps = weight.to(at::kDouble).permute({2, 3, 0, 1}).flatten(2).flatten(0, 1);
  return algorithm.filter_matrix().to(taps.options()).matmul(taps).view({-1, weight.size(0), weight.size(1)});
}

int64_t tiles_per_block(const TilePlan& plan, int64_t bytes_per_product_and_tile, int64_t bytes) {
  return std::max<int64_t>(12, bytes / (plan.products * bytes_per_product_and_tile));
}

}  // namespace baseq

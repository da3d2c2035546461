#pragma once

#include <cstdint>
#include <vector>

#include "baseq/conv/conv.h"

/// Transforms of tiles: the loops around the matrix products.
namespace baseq {

/// The entries of a small matrix that are not zero, row by row.
struct SparseRows {
  std::vector<int32_t> begin, column, value;  ///< row r has the entries begin[r] ... begin[r + 1]

  int64_t num_rows() const { return static_cast<int64_t>(begin.size()) - 1; }
};

/// A ConvAlgorithm in the form that the loops read. An SFC of 4 or 6 points has a circle, which shares sums between its
/// products; `input` and `output` then have what is outside of it.
struct AxisPlan {
  explicit AxisPlan(const ConvAlgorithm& algorithm);

  int64_t inputs, products, outputs;
  int64_t circle = 0;           ///< points, or none
  int64_t circle_products = 0;  ///< come first
  int64_t window = 0;           ///< the circle's first sample
  std::vector<int32_t> place;   ///< of each output on the circle
  SparseRows input, output;
};

/// A ConvAlgorithm2d in the form that the loops read.
struct TilePlan {
  explicit TilePlan(const ConvAlgorithm2d& algorithm);

  AxisPlan rows, cols;
  SparseRows input_mix, output_mix;  ///< without rows: the identity
  int64_t products, divisor;
};

/// Channels are worked on in blocks of this many.
constexpr int64_t kChannelBlock = 32;

/// How tiles cover an image.
struct TileGrid {
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t out_height = 0, out_width = 0;
  int64_t top = 0, left = 0;  ///< padding
  int64_t tiles_down = 0, tiles_across = 0;

  int64_t num_tiles() const { return batch * tiles_down * tiles_across; }
};
/// Throws c10::Error when `x` is not `[batch, channels, height, width]` or nothing is left to compute.
TileGrid tile_grid(const char* who, const Tensor& x, const ConvAlgorithm2d& algorithm, const Padding& padding);

/// Throws c10::Error unless `weight` is `[out_channels, in_channels, rows.taps, cols.taps]` and `bias` `[out_channels]`
/// or undefined.
void check_filters(const char* who, const Tensor& weight, const Tensor& bias, int64_t in_channels,
                   const ConvAlgorithm2d& algorithm);

/// The filter transforms of `weight` before the division by algorithm.divisor, float64 `[products, out_channels,
/// in_channels]`, exact for integers. Differentiable.
Tensor transformed_filters(const Tensor& weight, const ConvAlgorithm2d& algorithm);

/// The tiles [begin, end) of `x`, `[batch, height, width, channels]` in memory, to `out` `[products, end - begin,
/// channels]`.
void transform_input(const TilePlan& plan, const TileGrid& grid, const float* x, int64_t begin, int64_t end,
                     float* out);
void transform_input(const TilePlan& plan, const TileGrid& grid, const double* x, int64_t begin, int64_t end,
                     double* out);
void transform_input(const TilePlan& plan, const TileGrid& grid, const int8_t* x, int64_t begin, int64_t end,
                     int16_t* out);
/// Codes 128 + round(value * inverse_scale[product]), the rounded number between low and high.
struct CodeGrid {
  const float* inverse_scale;  ///< [products]
  float low, high;
};
void transform_input(const TilePlan& plan, const TileGrid& grid, const float* x, int64_t begin, int64_t end,
                     uint8_t* out, const CodeGrid& codes);

/// The products `[products, end - begin, channels]` of the tiles [begin, end) to `out`, `[batch, out_height, out_width,
/// channels]` in memory. `channels` are those of the output; `bias` may be null.
void transform_output(const TilePlan& plan, const TileGrid& grid, int64_t channels, const float* products,
                      int64_t begin, int64_t end, const float* bias, float* out);
void transform_output(const TilePlan& plan, const TileGrid& grid, int64_t channels, const double* products,
                      int64_t begin, int64_t end, const double* bias, double* out);
/// Sums that may have wrapped around: only the quotient has to fit.
void transform_output(const TilePlan& plan, const TileGrid& grid, int64_t channels, const int32_t* products,
                      int64_t begin, int64_t end, const int32_t* bias, int32_t* out);
void transform_output(const TilePlan& plan, const TileGrid& grid, int64_t channels, const int64_t* products,
                      int64_t begin, int64_t end, const int32_t* bias, int32_t* out);
/// Sums of codes; scale [products, channels rounded up to a whole number of blocks] holds the divisor already.
void transform_output(const TilePlan& plan, const TileGrid& grid, int64_t channels, const int32_t* products,
                      const float* scale, int64_t begin, int64_t end, const float* bias, float* out);

/// How many tiles to work on at a time, so that their transforms and products take about `bytes`.
int64_t tiles_per_block(const TilePlan& plan, int64_t bytes_per_product_and_tile, int64_t bytes);

}  // namespace baseq

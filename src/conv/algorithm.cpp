#include <ATen/ATen.h>

#include <Eigen/Core>
#include <algorithm>
#include <iterator>
#include <numeric>
#include <utility>
#include <vector>

#include "baseq/conv/conv.h"
#include "symbol.h"

namespace baseq {
namespace {

using Matrix = Eigen::Matrix<int64_t, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

Tensor to_tensor(const Matrix& matrix) {
  return at::from_blob(const_cast<int64_t*>(matrix.data()), {matrix.rows(), matrix.cols()}, at::kLong).clone();
}

/// The circular correlation c[k] = sum_j x[(k + j) mod N] w[j] of N samples and N taps.
struct Circle {
  Matrix input, filter;  // [products, N]
  Matrix output;         // [N, products], over N
};

Circle circular_correlation(const SymbolRing& ring) {
  const int64_t n = ring.points();
  const std::vector<Frequency> all = frequencies(n);
  const int64_t products = all.back().first_product + (all.back().is_real ? 1 : 3);
  Circle circle{Matrix::Zero(products, n), Matrix::Zero(products, n), Matrix::Zero(n, products)};
  for (const auto& [f, row, is_real] : all) {
    std::vector<Symbol> input, filter;
    for (int64_t i = 0; i < n; ++i) {
      input.push_back(ring.power(-f * i));
      filter.push_back(ring.power(f * i));  // conjugated, which makes the product a correlation
    }
    const int64_t sign = sign_of_sum(input, filter);
    for (int64_t i = 0; i < n; ++i) {
      circle.input(row, i) = input[i].real;
      circle.filter(row, i) = filter[i].real;
      if (is_real) {
        circle.output(i, row) = ring.power(f * i).real;
        continue;
      }
      circle.input(row + 1, i) = input[i].imaginary;
      circle.filter(row + 1, i) = filter[i].imaginary;
      circle.input(row + 2, i) = input[i].real + sign * input[i].imaginary;
      circle.filter(row + 2, i) = filter[i].real + sign * filter[i].imaginary;
      // From m1 = ac, m2 = bd, m3 the product is u + v s with u = m1 + square.real m2 and
      // v = sign (m3 - m1 - m2) + square.imaginary m2, and the output takes the trace of s^(f i) (u + v s).
      const int64_t of_u = ring.trace(f * i), of_v = ring.trace(f * i + 1);
      circle.output(i, row) = of_u - sign * of_v;
      circle.output(i, row + 1) = ring.square().real * of_u + (ring.square().imaginary - sign) * of_v;
      circle.output(i, row + 2) = sign * of_v;
    }
  }
  return circle;
}

/// A tap that reaches around the circle: output `output` needs sample `wanted` times tap `tap` and has sample `had`.
struct Correction {
  int64_t output, tap, wanted, had;
};

/// Of a circle over the samples [begin, begin + points).
std::vector<Correction> corrections(int64_t points, int64_t outputs, int64_t taps, int64_t begin) {
  std::vector<Correction> result;
  for (int64_t k = 0; k < outputs; ++k) {
    const int64_t place = ((k - begin) % points + points) % points;
    for (int64_t j = 0; j < taps; ++j) {
      const int64_t had = begin + (place + j) % points;
      if (had != k + j) result.push_back({k, j, k + j, had});
    }
  }
  return result;
}

/// Coefficients of prod (x - root) over the given roots, each root numerator / denominator and each factor
/// denominator * x - numerator; lowest power first.
using Point = std::pair<int64_t, int64_t>;
std::vector<int64_t> product_of_factors(const std::vector<Point>& roots) {
  std::vector<int64_t> coefficients = {1};
  for (const auto& [numerator, denominator] : roots) {
    std::vector<int64_t> next(coefficients.size() + 1, 0);
    for (size_t i = 0; i < coefficients.size(); ++i) {
      next[i] -= numerator * coefficients[i];
      next[i + 1] += denominator * coefficients[i];
    }
    coefficients = std::move(next);
  }
  return coefficients;
}

int64_t integer_power(int64_t base, int64_t exponent) {
  int64_t result = 1;
  for (; exponent > 0; --exponent) result *= base;
  return result;
}

}  // namespace

ConvAlgorithm sfc_algorithm(int64_t points, int64_t outputs, int64_t taps) {
  const SymbolRing ring(points);
  const int64_t samples = outputs + taps - 1;
  TORCH_CHECK(outputs >= 1 && taps >= 1 && samples >= points && samples <= 64, "sfc_algorithm: ", outputs,
              " outputs of ", taps, " taps have ", samples, " samples, expected ", points, " to 64 for a transform of ",
              points, " points");
  int64_t begin = 0;
  std::vector<Correction> wrong = corrections(points, outputs, taps, 0);
  for (int64_t candidate = 1; candidate <= samples - points; ++candidate) {
    std::vector<Correction> other = corrections(points, outputs, taps, candidate);
    if (other.size() < wrong.size()) {
      wrong = std::move(other);
      begin = candidate;
    }
  }
  // One product serves every output that lacks the same sample times the same tap.
  std::vector<Correction> distinct;
  std::vector<size_t> product_of;
  for (const Correction& c : wrong) {
    const auto same = [&](const Correction& d) { return d.tap == c.tap && d.wanted == c.wanted && d.had == c.had; };
    const auto found = std::find_if(distinct.begin(), distinct.end(), same);
    product_of.push_back(found - distinct.begin());
    if (found == distinct.end()) distinct.push_back(c);
  }
  const Circle circle = circular_correlation(ring);
  const int64_t core = circle.input.rows(), products = core + static_cast<int64_t>(distinct.size());
  Matrix input = Matrix::Zero(products, samples), filter = Matrix::Zero(products, taps),
         output = Matrix::Zero(outputs, products);
  input.block(0, begin, core, points) = circle.input;
  for (int64_t j = 0; j < taps; ++j) filter.col(j).head(core) = circle.filter.col(j % points);
  for (int64_t k = 0; k < outputs; ++k) {
    output.row(k).head(core) = circle.output.row(((k - begin) % points + points) % points);
  }
  for (size_t i = 0; i < distinct.size(); ++i) {
    const auto product = core + static_cast<int64_t>(i);
    input(product, distinct[i].wanted) = 1;
    input(product, distinct[i].had) = -1;
    filter(product, distinct[i].tap) = 1;
  }
  for (size_t i = 0; i < wrong.size(); ++i) {
    output(wrong[i].output, core + static_cast<int64_t>(product_of[i])) = points;
  }
  return {to_tensor(input), to_tensor(filter), to_tensor(output), points, outputs, taps, points};
}

ConvAlgorithm winograd_algorithm(int64_t outputs, int64_t taps) {
  static constexpr Point kPoints[] = {{0, 1}, {1, 1}, {-1, 1}, {2, 1}, {-2, 1}, {1, 2}, {-1, 2}};
  const int64_t products = outputs + taps - 1;
  TORCH_CHECK(outputs >= 1 && taps >= 1 && products - 1 <= static_cast<int64_t>(std::size(kPoints)),
              "winograd_algorithm: ", outputs, " outputs of ", taps, " taps need ", products - 1,
              " finite points, expected at most ", std::size(kPoints));
  const std::vector<Point> points(kPoints, kPoints + products - 1);
  // Interpolation of the transposed product: row t of B^T holds the factors of all other points, row t of G the powers
  // of point t over the product of its distances to the others, column t of A^T its powers. A point a/b enters as the
  // factor b x - a and its powers as a^k b^(n-k), which keeps everything but the distances whole.
  Matrix input = Matrix::Zero(products, products), filter = Matrix::Zero(products, taps),
         output = Matrix::Zero(outputs, products);
  std::vector<int64_t> distances(products, 1);
  for (int64_t t = 0; t + 1 < products; ++t) {
    const auto& [numerator, denominator] = points[t];
    distances[t] = denominator;
    std::vector<Point> others = points;
    others.erase(others.begin() + t);
    const std::vector<int64_t> coefficients = product_of_factors(others);
    for (size_t i = 0; i < coefficients.size(); ++i) input(t, i) = coefficients[i];
    for (const auto& [other, scale] : others) distances[t] *= scale * numerator - other * denominator;
    for (int64_t j = 0; j < taps; ++j) {
      filter(t, j) = integer_power(numerator, j) * integer_power(denominator, taps - 1 - j);
    }
    for (int64_t k = 0; k < outputs; ++k) {
      output(k, t) = integer_power(numerator, k) * integer_power(denominator, outputs - 1 - k);
    }
  }
  const std::vector<int64_t> all = product_of_factors(points);
  for (size_t i = 0; i < all.size(); ++i) input(products - 1, i) = all[i];
  filter(products - 1, taps - 1) = output(outputs - 1, products - 1) = 1;
  for (const auto& [numerator, denominator] : points) distances[products - 1] *= denominator;
  int64_t divisor = 1;
  for (const int64_t distance : distances) divisor = std::lcm(divisor, distance);
  for (int64_t t = 0; t < products; ++t) filter.row(t) *= divisor / distances[t];
  return {to_tensor(input), to_tensor(filter), to_tensor(output), divisor, outputs, taps, 0};
}

ConvAlgorithm direct_algorithm(int64_t taps) {
  TORCH_CHECK(taps >= 1, "direct_algorithm: taps is ", taps, ", expected at least 1");
  const Tensor identity = at::eye(taps, at::kLong);
  return {identity, identity, at::ones({1, taps}, at::kLong), 1, 1, taps, 0};
}

}  // namespace baseq

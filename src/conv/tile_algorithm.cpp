#include <ATen/ATen.h>

#include <array>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

#include "baseq/conv/conv.h"
#include "symbol.h"

namespace baseq {
namespace {

/// The four components c_ij of a product over s^i (rows) and s^j (columns).
enum Component { k00, k01, k10, k11 };
using Components = std::array<int64_t, 4>;  // a linear form in them

/// Writes one row of a mix after the other.
struct Mixes {
  Mixes(int64_t products, int64_t folded)
      : input(at::zeros({products, folded}, at::kLong)),
        filter(at::zeros({products, folded}, at::kLong)),
        output(at::zeros({folded, products}, at::kLong)) {}
  Tensor input, filter, output;

  static void add(const Tensor& matrix, int64_t row, int64_t column, int64_t value) {
    matrix.mutable_data_ptr<int64_t>()[row * matrix.size(1) + column] += value;
  }
};

/// Where the products of a pair of frequencies, f along the rows and g along the columns, stand in the folded form.
struct Place {
  int64_t row, column, width;
  int64_t at(int64_t i, int64_t j) const { return (row + i) * width + column + j; }
};

/// The frequencies (f, g) and (f, -g), six products in the place of nine.
class ConjugatePair {
 public:
  ConjugatePair(const SymbolRing& ring, int64_t f, int64_t g, Place place) : ring_(ring), f_(f), g_(g), place_(place) {}

  /// Adds the six products from number `first` on, with output rows over `scale` times the divisor of the folded form.
  void add_to(Mixes& mixes, int64_t first, int64_t scale) const {
    const int64_t p = ring_.square().imaginary, q = ring_.square().real;
    const Symbol conjugate = ring_.power(-1);
    // With s^2 = p s + q along both axes, and s along the columns conjugated in the second.
    add_products(mixes, first, {1, 0, 0, q}, {0, 1, 1, p}, g_);
    add_products(mixes, first + 3, {1, conjugate.real, 0, 1}, {0, conjugate.imaginary, 1, 0}, -g_);

    // The components of the product back from its values u1 + v1 s and u2 + v2 s at both frequencies.
    const int64_t a = conjugate.real, b = 1 - q, c = 1 - conjugate.imaginary, d = p, determinant = a * d - b * c;
    const auto over = [&](int64_t numerator) { return scale * numerator / determinant; };
    // u2 - u1 = a c01 + b c11 and v1 - v2 = c c01 + d c11; [u1, v1, u2, v2]
    const Components c01 = {over(-d), over(-b), over(d), over(b)}, c11 = {over(c), over(a), over(-c), over(-a)};
    Components c00{}, c10{};
    for (int64_t i = 0; i < 4; ++i) {
      c00[i] = (i == 0 ? scale : 0) - q * c11[i];
      c10[i] = (i == 3 ? scale : 0) - conjugate.imaginary * c01[i];
    }
    // The folded output takes three products for each axis, of which the second may be zero when the first is the part
    // before s and the third that plus sign times the part behind s.
    const int64_t row_sign = sign(f_), column_sign = sign(g_);
    for (const bool second_row : {false, true}) {
      for (const bool second_column : {false, true}) {
        Components sum = c00;
        for (int64_t i = 0; i < 4; ++i) {
          if (second_row) sum[i] += row_sign * c10[i];
          if (second_column) sum[i] += column_sign * c01[i];
          if (second_row && second_column) sum[i] += row_sign * column_sign * c11[i];
        }
        add_output(mixes, first, place_.at(second_row ? 2 : 0, second_column ? 2 : 0), sum);
      }
    }
  }

  /// What the components are fractions over.
  static int64_t denominator(const SymbolRing& ring) {
    const Symbol conjugate = ring.power(-1);
    const int64_t a = conjugate.real, b = 1 - ring.square().real, c = 1 - conjugate.imaginary,
                  d = ring.square().imaginary;
    const int64_t determinant = a * d - b * c;
    int64_t common = determinant;
    for (const int64_t numerator : {a, b, c, d}) common = std::gcd(common, numerator);
    return std::abs(determinant / common);
  }

 private:
  std::vector<Symbol> samples(int64_t direction, int64_t g) const {
    std::vector<Symbol> result;
    for (int64_t i = 0; i < ring_.points(); ++i) {
      for (int64_t j = 0; j < ring_.points(); ++j) result.push_back(ring_.power(direction * (f_ * i + g * j)));
    }
    return result;
  }
  /// The sign with which the transform along one axis takes its sum.
  int64_t sign(int64_t frequency) const {
    std::vector<Symbol> input, filter;
    for (int64_t i = 0; i < ring_.points(); ++i) {
      input.push_back(ring_.power(-frequency * i));
      filter.push_back(ring_.power(frequency * i));
    }
    return sign_of_sum(input, filter);
  }
  int64_t sign_at(int64_t g) const { return sign_of_sum(samples(-1, g), samples(1, g)); }

  void add_products(Mixes& mixes, int64_t first, const Components& real, const Components& imaginary, int64_t g) const {
    for (const Tensor* mix : {&mixes.input, &mixes.filter}) {
      for (const Component k : {k00, k01, k10, k11}) {
        const int64_t column = place_.at(k / 2, k % 2);
        Mixes::add(*mix, first, column, real[k]);
        Mixes::add(*mix, first + 1, column, imaginary[k]);
        Mixes::add(*mix, first + 2, column, real[k] + sign_at(g) * imaginary[k]);
      }
    }
  }
  /// values: of [u1, v1, u2, v2]; u = m1 + q m2, v = sign (m3 - m1 - m2) + p m2 for each frequency's three products.
  void add_output(Mixes& mixes, int64_t first, int64_t row, const Components& values) const {
    for (const int64_t which : {0, 1}) {
      const int64_t sum_sign = sign_at(which == 0 ? g_ : -g_), u = values[2 * which], v = values[2 * which + 1];
      Mixes::add(mixes.output, row, first + 3 * which, u - sum_sign * v);
      Mixes::add(mixes.output, row, first + 3 * which + 1,
                 ring_.square().real * u + (ring_.square().imaginary - sum_sign) * v);
      Mixes::add(mixes.output, row, first + 3 * which + 2, sum_sign * v);
    }
  }

  const SymbolRing& ring_;
  int64_t f_, g_;
  Place place_;
};

void make_symbolic(ConvAlgorithm2d& algorithm) {
  const SymbolRing ring(algorithm.rows.points);
  const std::vector<Frequency> all = frequencies(ring.points());
  const int64_t width = algorithm.cols.num_products(), folded = algorithm.rows.num_products() * width;
  const int64_t scale = ConjugatePair::denominator(ring);
  std::vector<bool> is_shared(folded, false);
  std::vector<std::pair<const Frequency*, const Frequency*>> pairs;
  for (const Frequency& f : all) {
    for (const Frequency& g : all) {
      if (f.is_real || g.is_real) continue;
      pairs.emplace_back(&f, &g);
      for (int64_t i = 0; i < 9; ++i) is_shared[(f.first_product + i / 3) * width + g.first_product + i % 3] = true;
    }
  }
  Mixes mixes(folded - 3 * static_cast<int64_t>(pairs.size()), folded);
  int64_t product = 0;
  for (int64_t i = 0; i < folded; ++i) {
    if (is_shared[i]) continue;
    Mixes::add(mixes.input, product, i, 1);
    Mixes::add(mixes.filter, product, i, 1);
    Mixes::add(mixes.output, i, product, scale);
    ++product;
  }
  for (const auto& [f, g] : pairs) {
    ConjugatePair(ring, f->index, g->index, {f->first_product, g->first_product, width}).add_to(mixes, product, scale);
    product += 6;
  }
  algorithm.input_mix = mixes.input;
  algorithm.filter_mix = mixes.filter;
  algorithm.output_mix = mixes.output;
  algorithm.divisor *= scale;
}

}  // namespace

int64_t ConvAlgorithm2d::num_products() const {
  return input_mix.defined() ? input_mix.size(0) : rows.num_products() * cols.num_products();
}

Tensor ConvAlgorithm2d::input_matrix() const {
  const Tensor folded = at::kron(rows.input_transform, cols.input_transform);
  return input_mix.defined() ? input_mix.matmul(folded) : folded;
}

Tensor ConvAlgorithm2d::filter_matrix() const {
  const Tensor folded = at::kron(rows.filter_transform, cols.filter_transform);
  return filter_mix.defined() ? filter_mix.matmul(folded) : folded;
}

Tensor ConvAlgorithm2d::output_matrix() const {
  const Tensor folded = at::kron(rows.output_transform, cols.output_transform);
  return output_mix.defined() ? folded.matmul(output_mix) : folded;
}

ConvAlgorithm2d tile_algorithm(ConvAlgorithm rows, ConvAlgorithm cols, ConvForm form) {
  TORCH_CHECK(form == ConvForm::kFolded || (rows.points != 0 && rows.points == cols.points),
              "tile_algorithm: the symbolic form of ", rows.points, " and ", cols.points,
              " points, expected SFC with the same number along both axes; take ConvForm::kFolded for others");
  ConvAlgorithm2d algorithm{.rows = std::move(rows), .cols = std::move(cols), .form = form};
  algorithm.divisor = algorithm.rows.divisor * algorithm.cols.divisor;
  if (form == ConvForm::kSymbolic) make_symbolic(algorithm);
  return algorithm;
}

ConvAlgorithm2d tile_algorithm(const ConvAlgorithm& axis, ConvForm form) { return tile_algorithm(axis, axis, form); }

}  // namespace baseq

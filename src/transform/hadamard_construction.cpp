#include "hadamard_construction.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>
#include <numeric>
#include <optional>
#include <set>
#include <unordered_map>
#include <utility>

namespace baseq {
namespace {

// A dense factor of order m costs about m / 4 additions per element and m^2 bytes.
constexpr int64_t kMaxFactorOrder = 2048;

// Orders 4w that no Paley construction and no product reaches, and whose search below succeeds.
constexpr int64_t kWilliamsonOrders[] = {92, 116, 172};

bool is_power_of_two(int64_t n) { return n > 0 && std::has_single_bit(static_cast<uint64_t>(n)); }

// ---- finite fields

struct PrimePower {
  int64_t prime;
  int64_t exponent;
};

std::optional<PrimePower> as_prime_power(int64_t q) {
  if (q < 2) return std::nullopt;
  int64_t prime = 2;
  while (prime * prime <= q && q % prime != 0) ++prime;
  if (q % prime != 0) prime = q;
  int64_t exponent = 0;
  for (; q % prime == 0; q /= prime) ++exponent;
  if (q != 1) return std::nullopt;
  return PrimePower{prime, exponent};
}

/// Coefficients in [0, p), the lowest power first. A field element is the number whose base-p digits they are.
using Polynomial = std::vector<int64_t>;

Polynomial digits(int64_t value, int64_t base, int64_t count) {
  Polynomial result(count);
  for (auto& digit : result) {
    digit = value % base;
    value /= base;
  }
  return result;
}

int64_t from_digits(const Polynomial& polynomial, int64_t base) {
  int64_t value = 0;
  for (auto digit = polynomial.rbegin(); digit != polynomial.rend(); ++digit) value = value * base + *digit;
  return value;
}

/// The remainder after division by a monic polynomial.
Polynomial remainder(Polynomial dividend, const Polynomial& divisor, int64_t prime) {
  const size_t degree = divisor.size() - 1;
  while (dividend.size() > degree) {
    const int64_t lead = dividend.back();
    const size_t shift = dividend.size() - divisor.size();
    for (size_t i = 0; i <= degree; ++i) {
      dividend[shift + i] = (dividend[shift + i] + (prime - lead) * divisor[i]) % prime;
    }
    dividend.pop_back();
  }
  return dividend;
}

Polynomial monic(int64_t low_digits, int64_t prime, int64_t degree) {
  Polynomial result = digits(low_digits, prime, degree);
  result.push_back(1);
  return result;
}

int64_t power(int64_t base, int64_t exponent) {
  int64_t result = 1;
  while (exponent-- > 0) result *= base;
  return result;
}

bool is_irreducible(const Polynomial& polynomial, int64_t prime) {
  const int64_t degree = static_cast<int64_t>(polynomial.size()) - 1;
  for (int64_t d = 1; 2 * d <= degree; ++d) {
    for (int64_t low = 0; low < power(prime, d); ++low) {
      if (from_digits(remainder(polynomial, monic(low, prime, d), prime), prime) == 0) return false;
    }
  }
  return true;
}

/// Q[i, j] = chi(a_i - a_j) over GF(q), chi the quadratic character (0 at 0).
SignMatrix jacobsthal(int64_t q) {
  const auto [prime, exponent] = *as_prime_power(q);
  Polynomial modulus;
  for (int64_t low = 0; modulus.empty(); ++low) {
    Polynomial candidate = monic(low, prime, exponent);
    if (is_irreducible(candidate, prime)) modulus = std::move(candidate);
  }
  std::vector<Polynomial> elements;
  for (int64_t a = 0; a < q; ++a) elements.push_back(digits(a, prime, exponent));

  std::vector<int8_t> character(q, -1);
  character[0] = 0;
  for (int64_t a = 1; a < q; ++a) {
    Polynomial square(2 * exponent - 1, 0);
    for (int64_t i = 0; i < exponent; ++i) {
      for (int64_t j = 0; j < exponent; ++j) {
        square[i + j] = (square[i + j] + elements[a][i] * elements[a][j]) % prime;
      }
    }
    character[from_digits(remainder(std::move(square), modulus, prime), prime)] = 1;
  }

  SignMatrix result(q, q);
  Polynomial difference(exponent);
  for (int64_t i = 0; i < q; ++i) {
    for (int64_t j = 0; j < q; ++j) {
      for (int64_t d = 0; d < exponent; ++d) difference[d] = (elements[i][d] - elements[j][d] + prime) % prime;
      result(i, j) = character[from_digits(difference, prime)];
    }
  }
  return result;
}

// ---- Paley (J. Math. Phys. 12, 1933)

bool has_paley_one(int64_t order) { return order % 4 == 0 && as_prime_power(order - 1).has_value(); }

bool has_paley_two(int64_t order) {
  return order % 4 == 0 && (order / 2 - 1) % 4 == 1 && as_prime_power(order / 2 - 1).has_value();
}

/// Q with a border: row 0 is (0, 1 ... 1), column 0 below it is `sign`.
SignMatrix bordered(const SignMatrix& q, int8_t sign) {
  SignMatrix result(q.rows() + 1, q.cols() + 1);
  result.row(0).setConstant(1);
  result.col(0).setConstant(sign);
  result(0, 0) = 0;
  result.bottomRightCorner(q.rows(), q.cols()) = q;
  return result;
}

SignMatrix paley_one(int64_t order) {
  SignMatrix result = bordered(jacobsthal(order - 1), -1);
  result.diagonal().setConstant(1);
  return result;
}

SignMatrix paley_two(int64_t order) {
  const SignMatrix conference = bordered(jacobsthal(order / 2 - 1), 1);
  SignMatrix result(order, order);
  for (int64_t i = 0; i < order / 2; ++i) {
    for (int64_t j = 0; j < order / 2; ++j) {
      const int8_t c = conference(i, j);
      if (i == j) {
        result.block<2, 2>(2 * i, 2 * j) << 1, -1, -1, -1;
      } else {
        result.block<2, 2>(2 * i, 2 * j) << c, c, c, static_cast<int8_t>(-c);
      }
    }
  }
  return result;
}

// ---- Williamson (Duke Math. J. 11, 1944): four symmetric circulants with A^2 + B^2 + C^2 + D^2 = 4w I

/// The orbit of each residue under multiplication by -1 and g: a sequence constant on the orbits is symmetric, and the
/// larger the group, the fewer sequences there are to search.
struct Orbits {
  int64_t count = 0;
  std::vector<int64_t> of;

  friend auto operator<=>(const Orbits&, const Orbits&) = default;
};

Orbits orbits_of(int64_t w, int64_t g) {
  Orbits orbits{0, std::vector<int64_t>(w, -1)};
  for (int64_t start = 1; start < w; ++start) {
    if (orbits.of[start] >= 0) continue;
    for (int64_t x = start; orbits.of[x] < 0 || orbits.of[w - x] < 0; x = x * g % w) {
      orbits.of[x] = orbits.of[w - x] = orbits.count;
    }
    ++orbits.count;
  }
  return orbits;
}

struct Sequence {
  std::vector<int8_t> sign;      // [w], sign[0] = 1
  std::vector<double> spectrum;  // squares of the eigenvalues of the circulant, [w/2 + 1]
  uint64_t key;                  // linear in the periodic autocorrelations at shifts 1 .. w/2
};

/// All sequences on the orbits whose squared eigenvalues leave room for the other three.
std::vector<Sequence> candidate_sequences(int64_t w, const Orbits& orbits) {
  std::vector<Sequence> result;
  for (int64_t bits = 0; bits < (int64_t{1} << orbits.count); ++bits) {
    Sequence sequence{std::vector<int8_t>(w, 1), {}, 0};
    for (int64_t i = 1; i < w; ++i) sequence.sign[i] = (bits >> orbits.of[i] & 1) != 0 ? -1 : 1;
    for (int64_t f = 0; f <= w / 2; ++f) {
      double eigenvalue = 1;
      for (int64_t i = 1; i <= w / 2; ++i) {
        eigenvalue += 2 * sequence.sign[i] * std::cos(2 * std::numbers::pi * static_cast<double>(i * f % w) / w);
      }
      sequence.spectrum.push_back(eigenvalue * eigenvalue);
      if (sequence.spectrum.back() > 4.0 * w + 1e-6) break;
    }
    if (sequence.spectrum.back() > 4.0 * w + 1e-6) continue;
    uint64_t multiplier = 0x9E3779B97F4A7C15u;
    for (int64_t shift = 1; shift <= w / 2; ++shift) {
      int64_t autocorrelation = 0;
      for (int64_t i = 0; i < w; ++i) autocorrelation += sequence.sign[i] * sequence.sign[(i + shift) % w];
      sequence.key += static_cast<uint64_t>(autocorrelation) * multiplier;
      multiplier *= 0xD1342543DE82EF95u;
    }
    result.push_back(std::move(sequence));
  }
  return result;
}

SignMatrix from_circulants(const std::vector<const Sequence*>& abcd, int64_t w) {
  // [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]
  constexpr int kIndex[4][4] = {{0, 1, 2, 3}, {1, 0, 3, 2}, {2, 3, 0, 1}, {3, 2, 1, 0}};
  constexpr int kSign[4][4] = {{1, 1, 1, 1}, {-1, 1, -1, 1}, {-1, 1, 1, -1}, {-1, -1, 1, 1}};
  SignMatrix result(4 * w, 4 * w);
  for (int64_t i = 0; i < 4 * w; ++i) {
    for (int64_t j = 0; j < 4 * w; ++j) {
      const auto& sign = abcd[kIndex[i / w][j / w]]->sign;
      result(i, j) = static_cast<int8_t>(kSign[i / w][j / w] * sign[(j % w - i % w + w) % w]);
    }
  }
  return result;
}

bool is_hadamard(const SignMatrix& h) {
  const Eigen::MatrixXi integer = h.cast<int>();
  return (integer * integer.transpose()).eval() == Eigen::MatrixXi::Identity(h.rows(), h.cols()) * int(h.rows());
}

/// Meets in the middle: two pairs of sequences whose autocorrelations cancel at every shift.
std::optional<SignMatrix> williamson_on_orbits(int64_t w, const Orbits& orbits) {
  const std::vector<Sequence> sequences = candidate_sequences(w, orbits);
  std::unordered_map<uint64_t, std::pair<const Sequence*, const Sequence*>> pairs;
  for (const Sequence& a : sequences) {
    for (const Sequence& b : sequences) {
      const bool fits = std::equal(a.spectrum.begin(), a.spectrum.end(), b.spectrum.begin(),
                                   [w](double x, double y) { return x + y <= 4.0 * w + 1e-6; });
      if (fits) {
        pairs.emplace(a.key + b.key, std::pair(&a, &b));
        if (auto other = pairs.find(-(a.key + b.key)); other != pairs.end()) {
          SignMatrix result = from_circulants({&a, &b, other->second.first, other->second.second}, w);
          if (is_hadamard(result)) return result;
        }
      }
      if (&a == &b) break;
    }
  }
  return std::nullopt;
}

SignMatrix williamson(int64_t order) {
  const int64_t w = order / 4;
  std::set<Orbits> candidates;  // fewest orbits first
  for (int64_t g = 1; g < w; ++g) {
    if (std::gcd(g, w) == 1) candidates.insert(orbits_of(w, g));
  }
  for (const Orbits& orbits : candidates) {
    if (auto found = williamson_on_orbits(w, orbits)) return *std::move(found);
  }
  TORCH_INTERNAL_ASSERT(false, "no Williamson matrix of order ", order);
}

SignMatrix sylvester(int64_t order) {
  SignMatrix result(order, order);
  for (int64_t i = 0; i < order; ++i) {
    for (int64_t j = 0; j < order; ++j) result(i, j) = std::popcount(static_cast<uint64_t>(i & j)) % 2 == 0 ? 1 : -1;
  }
  return result;
}

bool has_dense_factor(int64_t order) {
  return order <= kMaxFactorOrder && !is_power_of_two(order) &&
         (has_paley_one(order) || has_paley_two(order) || std::ranges::count(kWilliamsonOrders, order) > 0);
}

// Measured on the CPU kernel, in additions per element: a dense factor of order m costs m and this much besides, and a
// power of two below 16 makes the kernel transpose rows.
constexpr int64_t kFactorCost = 30;
constexpr int64_t kTransposeCost = 60;

struct Decomposition {
  std::vector<int64_t> dense;
  int64_t cost = 0;
};

/// Dense factors, in descending order and at most `largest`, whose product is n up to a power of two.
std::optional<Decomposition> cheapest_decomposition(int64_t n, int64_t largest) {
  std::optional<Decomposition> best;
  if (is_power_of_two(n)) best = Decomposition{{}, n < 16 ? kTransposeCost : 0};
  for (int64_t m = 12; m <= std::min(n, largest); m += 4) {
    if (n % m != 0 || !has_dense_factor(m)) continue;
    auto rest = cheapest_decomposition(n / m, m);
    if (!rest) continue;
    rest->dense.insert(rest->dense.begin(), m);
    rest->cost += m + kFactorCost;
    if (!best || rest->cost < best->cost) best = std::move(rest);
  }
  return best;
}

}  // namespace

std::vector<int64_t> hadamard_factors(int64_t n) {
  TORCH_CHECK(n >= 1, "hadamard_factors: n is ", n, " but a size is at least 1");
  auto best = cheapest_decomposition(n, kMaxFactorOrder);
  if (!best) return {};
  for (const int64_t m : best->dense) n /= m;
  best->dense.push_back(n);
  return std::move(best->dense);
}

SignMatrix hadamard_signs(int64_t order) {
  if (is_power_of_two(order)) return sylvester(order);
  if (has_paley_one(order)) return paley_one(order);
  if (has_paley_two(order)) return paley_two(order);
  return williamson(order);
}

}  // namespace baseq

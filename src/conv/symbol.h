#pragma once

#include <cstdint>
#include <vector>

/// The symbols of the symbolic Fourier transform: integers a + b s, where s is an N-th root of unity.
namespace baseq {

struct Symbol {
  int64_t real = 0, imaginary = 0;  ///< a and b
};

/// The root of N points satisfies s^2 = square.imaginary * s + square.real.
class SymbolRing {
 public:
  /// Throws c10::Error unless `points` is 3, 4 or 6.
  explicit SymbolRing(int64_t points);

  int64_t points() const { return points_; }
  Symbol square() const { return square_; }
  Symbol multiply(Symbol a, Symbol b) const;
  Symbol power(int64_t exponent) const;   ///< s^exponent, of any sign
  int64_t trace(int64_t exponent) const;  ///< s^exponent plus its conjugate

 private:
  int64_t points_;
  Symbol square_;
  std::vector<Symbol> powers_;
};

/// A frequency of real data: one product when it is its own conjugate, three otherwise.
struct Frequency {
  int64_t index = 0;
  int64_t first_product = 0;
  bool is_real = false;
};
/// One of each conjugate pair, in the order of the products.
std::vector<Frequency> frequencies(int64_t points);

/// (a + b s)(c + d s) takes the products ac, bd and (a + sign b)(c + sign d). The sign that keeps the transforms of
/// both factors at 0 and +-1; each factor is a list of symbols, one for every sample.
int64_t sign_of_sum(const std::vector<Symbol>& input, const std::vector<Symbol>& filter);

}  // namespace baseq

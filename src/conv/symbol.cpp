#include "symbol.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>

namespace baseq {

SymbolRing::SymbolRing(int64_t points) : points_(points) {
  TORCH_CHECK(points == 3 || points == 4 || points == 6, "sfc_algorithm: points is ", points, ", expected 3, 4 or 6");
  square_ = points == 6 ? Symbol{-1, 1} : points == 4 ? Symbol{-1, 0} : Symbol{-1, -1};
  powers_ = {{1, 0}};
  while (static_cast<int64_t>(powers_.size()) < points) powers_.push_back(multiply(powers_.back(), {0, 1}));
}

Symbol SymbolRing::multiply(Symbol a, Symbol b) const {
  const int64_t s2 = a.imaginary * b.imaginary;
  return {a.real * b.real + square_.real * s2, a.real * b.imaginary + a.imaginary * b.real + square_.imaginary * s2};
}

Symbol SymbolRing::power(int64_t exponent) const { return powers_[((exponent % points_) + points_) % points_]; }

int64_t SymbolRing::trace(int64_t exponent) const {
  // A symbol plus its conjugate is real; the imaginary parts of s^n and s^-n cancel.
  return power(exponent).real + power(-exponent).real;
}

std::vector<Frequency> frequencies(int64_t points) {
  std::vector<Frequency> result;
  int64_t product = 0;
  for (int64_t index = 0; index <= points / 2; ++index) {
    const bool is_real = 2 * index % points == 0;
    result.push_back({index, product, is_real});
    product += is_real ? 1 : 3;
  }
  return result;
}

int64_t sign_of_sum(const std::vector<Symbol>& input, const std::vector<Symbol>& filter) {
  const auto is_ternary = [](const std::vector<Symbol>& symbols, int64_t sign) {
    return std::all_of(symbols.begin(), symbols.end(),
                       [&](Symbol s) { return std::abs(s.real + sign * s.imaginary) <= 1; });
  };
  return !(is_ternary(input, 1) && is_ternary(filter, 1)) && is_ternary(input, -1) && is_ternary(filter, -1) ? -1 : 1;
}

}  // namespace baseq

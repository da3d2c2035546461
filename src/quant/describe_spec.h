#pragma once

#include <fmt/format.h>

#include <optional>
#include <string>

#include "baseq/quant/quantize.h"

namespace baseq {

/// "4 bits, symmetric, per group of 64", or "full precision". The group of the cache is a head, whose size a
/// recipe does not know: "per token and head".
inline std::string describe(const std::optional<QuantSpec>& spec) {
  if (!spec) return "full precision";
  const char* strategies[] = {"tensor", "channel", "group", "token"};
  std::string per = strategies[static_cast<size_t>(spec->strategy)];
  if (spec->strategy == Strategy::kGroup) {
    per = spec->group_size > 0 ? fmt::format("group of {}", spec->group_size) : "token and head";
  }
  return fmt::format("{} bits, {}, per {}", spec->num_bits, spec->symmetric ? "symmetric" : "asymmetric", per);
}

}  // namespace baseq

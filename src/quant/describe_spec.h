#pragma once

#include <fmt/format.h>

#include <optional>
#include <string>

#include "baseq/quant/quantize.h"

namespace baseq {

/// "4 bits, symmetric, per group of 64", or "full precision".
inline std::string describe(const std::optional<QuantSpec>& spec) {
  if (!spec) return "full precision";
  const char* strategies[] = {"tensor", "channel", "group", "token"};
  std::string text = fmt::format("{} bits, {}, per {}", spec->num_bits, spec->symmetric ? "symmetric" : "asymmetric",
                                 strategies[static_cast<size_t>(spec->strategy)]);
  if (spec->strategy == Strategy::kGroup) text += fmt::format(" of {}", spec->group_size);
  return text;
}

}  // namespace baseq

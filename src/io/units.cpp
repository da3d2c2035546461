#include "io/units.h"

#include <fmt/format.h>

namespace baseq {

std::string format_bytes(int64_t bytes) {
  constexpr double kUnit = 1024.0;
  const auto value = static_cast<double>(bytes);
  if (value < kUnit) return fmt::format("{} B", bytes);
  if (value < kUnit * kUnit) return fmt::format("{:.0f} KiB", value / kUnit);
  if (value < 10 * kUnit * kUnit * kUnit) return fmt::format("{:.1f} MiB", value / (kUnit * kUnit));
  return fmt::format("{:.2f} GiB", value / (kUnit * kUnit * kUnit));
}

std::string format_seconds(double seconds) {
  if (seconds < 60) return fmt::format("{:.1f} s", seconds);
  const auto total = static_cast<int64_t>(seconds);
  if (total < 3600) return fmt::format("{}:{:02} min", total / 60, total % 60);
  return fmt::format("{}:{:02}:{:02} h", total / 3600, total / 60 % 60, total % 60);
}

}  // namespace baseq

#pragma once

#include <cstdint>
#include <string>

namespace baseq {

/// "9.5 MiB"; the largest of B, KiB and MiB of which there is one, GiB from 10240 MiB on.
std::string format_bytes(int64_t bytes);
/// "5.3 s", "4:07 min", "1:02:03 h".
std::string format_seconds(double seconds);

}  // namespace baseq

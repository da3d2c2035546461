#pragma once

#include <array>
#include <string>

#include "report/report.h"

namespace baseq {

/// What a reader asks first, a sentence each from the data of the report, not escaped: whether the model is good, where
/// it is bad, and what would help.
std::array<std::string, 3> verdict(const Report& report);

}  // namespace baseq

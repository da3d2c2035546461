#pragma once

#include <string>

#include "pipeline/run_log.h"

namespace baseq {

/// Of a report: what passes over the model did to their losses; empty where there were none.
std::string whole_model_section(const RunRecord& run);

}  // namespace baseq

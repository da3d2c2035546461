#pragma once

#include <nlohmann/json.hpp>
#include <vector>

namespace baseq::cli {

/// What `eval --json` or `compare --json` wrote: an object for each model; empty for any other JSON.
std::vector<nlohmann::json> results_in(const nlohmann::json& written);

/// The same of a file; throws c10::Error where there are none.
std::vector<nlohmann::json> read_results(const std::string& file);

}  // namespace baseq::cli

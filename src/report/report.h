#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "eval/checkpoint_summary.h"
#include "pipeline/run_log.h"

namespace baseq {

/// What a report shows. Nothing in it is trusted: every text is escaped, every number may be missing.
struct Report {
  CheckpointSummary summary;
  nlohmann::json config;                ///< config.json of the checkpoint
  RunRecord run;                        ///< may be empty
  std::vector<nlohmann::json> results;  ///< objects as `eval --json` writes them
};

/// One HTML page that needs nothing else: styles and charts (SVG) are inside, there is no script, and nothing is
/// fetched.
std::string html_report(const Report& report);

}  // namespace baseq

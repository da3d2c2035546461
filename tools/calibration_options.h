#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "baseq/pipeline/job.h"

namespace baseq::cli {

/// What the options of calibration say.
struct CalibrationArguments {
  std::vector<std::string> files;  ///< FILE or FILE:WEIGHT, "-" is stdin
  CalibrationData::Split split = CalibrationData::Split::kRandom;

  bool empty() const { return files.empty(); }
};

/// --calibration and --calibration-split.
void add_calibration_options(CLI::App& command, CalibrationArguments& arguments);

/// Throws c10::Error for a weight that is no positive number.
CalibrationData calibration_data(const CalibrationArguments& arguments);

/// What was taken of a file, a sentence.
std::string describe_read(const CalibrationRead& read);
/// The same of all files for --json, a list.
nlohmann::json json_of_reads(const std::vector<CalibrationRead>& reads);

}  // namespace baseq::cli

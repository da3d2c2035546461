#pragma once

#include <string>
#include <vector>

#include "baseq/pipeline/job.h"
#include "calibration_options.h"
#include "commands.h"

namespace baseq::cli {

struct QuantizeArguments {
  CommonOptions common;
  std::string model, recipe, output, work, resume, log;
  CalibrationArguments calibration;
  std::string activations;  ///< "ram", "disk", or empty: ram unless --memory says otherwise
  std::vector<std::string> overrides;
  int64_t shard_megabytes = 4768;
  std::vector<std::string> memory;  ///< budgets in bytes, that of a GPU after kGpuMemory
  bool force = false, dry_run = false;
  Communicator processes{};  ///< that share the run; the first one looks for problems, and reports
};

/// The recipe of a name or a file with the values of --set, "KEY=VALUE".
Recipe read_recipe(const std::string& recipe, const std::vector<std::string>& overrides);

/// A job that the command line describes, looked at from all sides before it starts.
struct PreparedRun {
  Job job{};
  RunPlan plan{};
  std::vector<CalibrationRead> calibration{};  ///< what was read; empty for a run that goes on
  std::string memory_choice{};                 ///< what --memory led to, a sentence; empty without it
  std::vector<std::string> defaults{};         ///< what the program chose, each a sentence
};

/// Checks the files of --json and --log-json, see check_outputs().
void check_quantize_outputs(const QuantizeArguments& arguments);

/// Throws c10::Error with everything that was found wrong, not the first only.
PreparedRun prepare(QuantizeArguments arguments);

/// One error for several problems: the sentence itself when there is one.
[[noreturn]] void throw_problems(const std::vector<std::string>& problems);

/// What --dry-run says: needs of memory, disk and time.
void print_plan(const QuantizeArguments& arguments, const PreparedRun& prepared, double seconds);

}  // namespace baseq::cli

#pragma once

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "baseq/pipeline/job.h"

namespace baseq::cli {

/// Progress on stderr. On a terminal one line with what is being done, the time left and the memory, drawn anew in its
/// place, and a table of the errors at the end; otherwise a line for every linear, stage and block.
class ProgressDisplay {
 public:
  explicit ProgressDisplay(bool quiet);
  ~ProgressDisplay();  ///< takes the bar away
  ProgressDisplay(const ProgressDisplay&) = delete;
  ProgressDisplay& operator=(const ProgressDisplay&) = delete;

  void show(const ProgressEvent& event);
  /// The bar at `done` of `total` steps.
  void step(int64_t done, int64_t total, const std::string& what);

 private:
  void line(const std::string& text);
  void detail_or_line(const std::string& detail, const std::string& text);
  void count_error(const std::string& name, int64_t block, double error);
  void print_errors();
  void clear();
  void draw();

  bool quiet_, terminal_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  int64_t first_ = 0, done_ = 0, total_ = 0;  ///< first_: steps that an earlier run had done
  std::string what_, detail_;
  /// By name, in the order in which they come: errors and their blocks.
  std::vector<std::pair<std::string, std::vector<std::pair<double, int64_t>>>> errors_;
  bool drawn_ = false;
};

}  // namespace baseq::cli

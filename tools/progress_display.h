#pragma once

#include <chrono>
#include <string>

#include "baseq/pipeline/job.h"

namespace baseq::cli {

/// Progress on stderr: a bar with what is being done, the time left and the memory when stderr is a terminal, and lines
/// above it or alone otherwise.
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
  void clear();
  void draw();

  bool quiet_, terminal_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  int64_t first_ = 0, done_ = 0, total_ = 0;  ///< first_: steps that an earlier run had done
  std::string what_, detail_;
  bool drawn_ = false;
};

}  // namespace baseq::cli

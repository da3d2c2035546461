#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace baseq::cli {

/// How a process ended.
struct ChildStatus {
  int exit_code = 0;  ///< meaningless when a signal ended it
  int signal = 0;

  bool success() const { return signal == 0 && exit_code == 0; }
};

/// From now on the signals of forward_stop_signals() are passed on to the child of run_self().
void forward_signals_to_child();

/// Runs this program again with `arguments` and waits; what it prints is appended to `log`, or, if that is empty, goes
/// where this process prints. However this process ends, the child ends with it. Throws c10::Error when it cannot be
/// started. To be called from the main thread.
ChildStatus run_self(const std::vector<std::string>& arguments, const std::filesystem::path& log);

}  // namespace baseq::cli

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

/// Runs this program again with `arguments` and waits; what it prints is appended to `log`. Signals that
/// forward_signals() catches are passed on to it. Throws c10::Error when it cannot be started.
ChildStatus run_self(const std::vector<std::string>& arguments, const std::filesystem::path& log);

/// From now on SIGINT and SIGTERM are for the child, and remembered.
void forward_signals();
bool was_signalled();

}  // namespace baseq::cli

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

/// Children that run_self() can have at a time.
inline constexpr int kMostChildren = 256;

/// From now on the signals of forward_stop_signals() are passed on to the children of run_self().
void forward_signals_to_children();

/// Runs this program again with `arguments` and waits; what it prints is appended to `log`, or, if that is empty, goes
/// where this process prints. However this process ends, the child ends with it. Throws c10::Error when it cannot be
/// started. May be called from several threads.
/// @param launcher words of a command that starts the program, such as "srun -n 1"; empty: it is started itself
ChildStatus run_self(const std::vector<std::string>& arguments, const std::filesystem::path& log,
                     const std::vector<std::string>& launcher = {});

}  // namespace baseq::cli

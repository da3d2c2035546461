#include "spinning.h"

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

namespace baseq::cli {
namespace {

/// Some ten microseconds, about what waking a thread takes: parallel regions in quick succession stay as fast as with
/// threads that spin.
constexpr const char* kSpinCount = "2000";

}  // namespace

void limit_spinning() {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr) return;
  std::ifstream command_line("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> arguments;
  for (std::string argument; std::getline(command_line, argument, '\0');) arguments.push_back(argument);
  if (arguments.empty() || ::setenv("GOMP_SPINCOUNT", kSpinCount, /*overwrite=*/1) != 0) return;
  std::vector<char*> pointers;
  for (std::string& argument : arguments) pointers.push_back(argument.data());
  pointers.push_back(nullptr);
  ::execv("/proc/self/exe", pointers.data());
  // Where that fails, the run is only slower beside others.
}

}  // namespace baseq::cli

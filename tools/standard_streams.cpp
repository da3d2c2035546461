#include "standard_streams.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <system_error>

namespace baseq::cli {

bool open_closed_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (::fcntl(stream, F_GETFD) >= 0) continue;
    // The lowest number that is free is this one. The wrong direction makes its use an error.
    if (::open("/dev/null", stream == STDIN_FILENO ? O_WRONLY : O_RDONLY) != stream) return false;
  }
  return true;
}

void flush_stdout() {
  TORCH_CHECK(std::fflush(stdout) == 0, "write error on stdout: ", std::generic_category().message(errno));
  TORCH_CHECK(std::ferror(stdout) == 0, "write error on stdout");  // of an earlier write, whose reason is gone
}

}  // namespace baseq::cli

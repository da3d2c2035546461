#include "stop_signals.h"

#include <atomic>
#include <cerrno>
#include <csignal>

namespace baseq::cli {
namespace {

std::atomic<bool> requested{false}, other_than_interrupt{false};
std::atomic<void (*)(int)> forward_to{nullptr};

void handle(int signal) {
  const int error = errno;
  requested = true;
  if (signal != SIGINT) other_than_interrupt = true;
  if (const auto forward = forward_to.load()) {
    forward(signal);
  } else if (signal == SIGINT || signal == SIGTERM) {
    // Not after SIGHUP, which a closed terminal may send twice.
    std::signal(SIGINT, SIG_DFL);
    std::signal(SIGTERM, SIG_DFL);
  }
  errno = error;
}

}  // namespace

void catch_stop_signals() {
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) {
    struct sigaction action {};
    if (signal == SIGHUP && ::sigaction(signal, nullptr, &action) == 0 && action.sa_handler == SIG_IGN) continue;
    action = {};
    action.sa_handler = handle;
    action.sa_flags = SA_RESTART;
    ::sigaction(signal, &action, nullptr);
  }
}

void forward_stop_signals(void (*forward)(int)) {
  forward_to = forward;
  catch_stop_signals();
}

bool stop_requested() { return requested; }

bool only_interrupted() { return requested && !other_than_interrupt; }

void release_stop_signals() {
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) {
    struct sigaction action {};
    if (::sigaction(signal, nullptr, &action) == 0 && action.sa_handler == handle) std::signal(signal, SIG_DFL);
  }
  requested = other_than_interrupt = false;
}

}  // namespace baseq::cli

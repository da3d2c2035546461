#include "child_process.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <initializer_list>
#include <system_error>

#include "stop_signals.h"

namespace baseq::cli {
namespace {

/// A child that runs, or the room for one.
struct Child {
  static constexpr pid_t kNone = 0, kStarting = -1;
  std::atomic<pid_t> pid{kNone};
  std::atomic<bool> told{false};  ///< of the first signal
};
std::array<Child, kMostChildren> children;
std::atomic<int> num_signals{0};

/// The first signal reaches each child once, from here or from run_self(); all others from here.
void forward(int signal) {
  const bool first = num_signals++ == 0;
  for (Child& child : children) {
    const pid_t pid = child.pid;
    if (pid > 0 && !(child.told.exchange(true) && first)) ::kill(pid, signal);
  }
}

Child& room_for_child() {
  for (Child& child : children) {
    pid_t none = Child::kNone;
    if (child.pid.compare_exchange_strong(none, Child::kStarting)) {
      child.told = false;
      return child;
    }
  }
  TORCH_CHECK(false, "more than ", kMostChildren, " processes at a time");
}

/// What a child does between fork and exec, with nothing but system calls: other threads of its parent are gone, and
/// what they held is not.
[[noreturn]] void become(const char* program, char* const* words, const char* log, int failure, pid_t parent,
                         const sigset_t& mask) {
  const auto fail = [failure] {
    const int error = errno;
    (void)!::write(failure, &error, sizeof(error));
    ::_exit(127);
  };
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGPIPE}) {
    struct sigaction action {};
    if (::sigaction(signal, nullptr, &action) == 0 && action.sa_handler != SIG_IGN) std::signal(signal, SIG_DFL);
  }
  // A group of its own: Ctrl-C reaches it once, through forward().
  ::setpgid(0, 0);
  // Killed and not asked: whoever starts the parent again finds the work directory free.
  if (::prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) fail();
  if (::getppid() != parent) ::_exit(127);  // it ended before the line above
  const auto redirect = [&](int file, std::initializer_list<int> streams) {
    if (file < 0) fail();
    for (const int stream : streams) {
      if (::dup2(file, stream) < 0) fail();
    }
    if (file > STDERR_FILENO) ::close(file);
  };
  redirect(::open("/dev/null", O_RDONLY), {STDIN_FILENO});
  if (*log != '\0') redirect(::open(log, O_WRONLY | O_CREAT | O_APPEND, 0666), {STDOUT_FILENO, STDERR_FILENO});
  ::sigprocmask(SIG_SETMASK, &mask, nullptr);
  ::execvp(program, words);
  fail();
  ::_exit(127);
}

}  // namespace

void forward_signals_to_children() { forward_stop_signals(forward); }

ChildStatus run_self(const std::vector<std::string>& arguments, const std::filesystem::path& log,
                     const std::vector<std::string>& launcher) {
  std::vector<std::string> words = launcher;
  // Another machine finds this program by its path, if at all.
  words.push_back(launcher.empty() ? "baseq" : std::filesystem::read_symlink("/proc/self/exe").string());
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  const auto check = [&](bool done, int error) {
    TORCH_CHECK(done, "cannot start a process", log.empty() ? "" : " that writes to " + log.string(), ": ",
                std::generic_category().message(error));
  };
  std::array<int, 2> failure{};  // closed by exec; what comes through it is why there was none
  check(::pipe2(failure.data(), O_CLOEXEC) == 0, errno);
  Child& child = room_for_child();
  // No signal to this thread between the birth of the child and the moment that forward() knows of it.
  sigset_t all, mask;
  ::sigfillset(&all);
  ::sigprocmask(SIG_BLOCK, &all, &mask);
  const char* program = launcher.empty() ? "/proc/self/exe" : pointers[0];
  const pid_t parent = ::getpid(), pid = ::fork();
  if (pid == 0) become(program, pointers.data(), log.c_str(), failure[1], parent, mask);
  const int fork_error = errno;
  child.pid = std::max(pid, Child::kNone);
  // By a signal that had no child to go to.
  if (pid > 0 && stop_requested() && !child.told.exchange(true)) ::kill(pid, SIGTERM);
  ::sigprocmask(SIG_SETMASK, &mask, nullptr);
  ::close(failure[1]);
  int error = 0;
  ssize_t count = 0;
  while (pid > 0 && (count = ::read(failure[0], &error, sizeof(error))) < 0 && errno == EINTR) continue;
  ::close(failure[0]);
  check(pid > 0, fork_error);
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0) TORCH_CHECK(errno == EINTR, "cannot wait for process ", pid);
  child.pid = Child::kNone;
  check(count <= 0, error);
  return {.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 0,
          .signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0};
}

}  // namespace baseq::cli

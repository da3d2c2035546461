#include "child_process.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <spawn.h>
#include <sys/wait.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <system_error>

extern char** environ;

namespace baseq::cli {
namespace {

std::atomic<pid_t> child{0};
std::atomic<bool> signalled{false};

void forward(int signal) {
  signalled = true;
  if (const pid_t pid = child; pid > 0) ::kill(pid, signal);
}

void check(int error, const std::string& action) {
  TORCH_CHECK(error == 0, "cannot ", action, ": ", std::generic_category().message(error));
}

}  // namespace

void forward_signals() {
  struct sigaction action {};
  action.sa_handler = forward;
  action.sa_flags = SA_RESTART;
  for (const int signal : {SIGINT, SIGTERM}) ::sigaction(signal, &action, nullptr);
}

bool was_signalled() { return signalled; }

ChildStatus run_self(const std::vector<std::string>& arguments, const std::filesystem::path& log) {
  std::vector<std::string> words{"baseq"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  posix_spawn_file_actions_t files;
  posix_spawnattr_t attributes;
  check(posix_spawn_file_actions_init(&files), "start a process");
  check(posix_spawnattr_init(&attributes), "start a process");
  posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&files, 1, log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0666);
  posix_spawn_file_actions_adddup2(&files, 1, 2);
  // A group of its own: Ctrl-C reaches it once, through forward().
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  pid_t pid = 0;
  const int error = posix_spawn(&pid, "/proc/self/exe", &files, &attributes, pointers.data(), environ);
  posix_spawn_file_actions_destroy(&files);
  posix_spawnattr_destroy(&attributes);
  check(error, "start a process that writes to " + log.string());
  child = pid;
  // A signal between the two lines above found no child to forward to.
  if (signalled) ::kill(pid, SIGTERM);
  int status = 0;
  while (::waitpid(pid, &status, 0) < 0) TORCH_CHECK(errno == EINTR, "cannot wait for process ", pid);
  child = 0;
  return {.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 0,
          .signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0};
}

}  // namespace baseq::cli

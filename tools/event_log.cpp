#include "event_log.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <ctime>
#include <system_error>

#include "pipeline/run_log.h"

namespace baseq::cli {
namespace {

std::string message_of(int error) { return std::generic_category().message(error); }

/// "2026-01-31T12:00:00.123Z".
std::string now() {
  using namespace std::chrono;
  const auto time = system_clock::now();
  const std::time_t seconds = system_clock::to_time_t(time);
  const auto milliseconds = duration_cast<std::chrono::milliseconds>(time.time_since_epoch()).count() % 1000;
  std::tm utc{};
  gmtime_r(&seconds, &utc);
  return fmt::format("{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday,
                     utc.tm_hour, utc.tm_min, utc.tm_sec, milliseconds);
}

/// Cuts a last line without an end, which a full disk or a lost machine may have left.
void cut_unfinished_line(const std::string& path, int descriptor) {
  struct stat status {};
  TORCH_CHECK(::fstat(descriptor, &status) == 0, "--log-json ", path, ": ", message_of(errno));
  if (status.st_size == 0) return;
  char byte = 0;
  TORCH_CHECK(::pread(descriptor, &byte, 1, 0) == 1 && byte == '{', "--log-json ", path,
              ": exists and is no log; choose another file");
  off_t end = status.st_size;
  while (end > 0 && ::pread(descriptor, &byte, 1, end - 1) == 1 && byte != '\n') --end;
  TORCH_CHECK(end == status.st_size || ::ftruncate(descriptor, end) == 0, "--log-json ", path, ": ", message_of(errno));
}

}  // namespace

EventLog::EventLog(const std::string& path) : path_(path) {
  if (path.empty()) return;
  struct stat status {};
  // A pipe or a device is written through. Opened for reading too, a pipe would not show that its reader is gone.
  const bool through = ::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode);
  descriptor_ = through ? ::open(path.c_str(), O_WRONLY | O_CLOEXEC | O_NOCTTY)
                        : ::open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
  TORCH_CHECK(descriptor_ >= 0, "--log-json ", path, ": cannot be opened: ", message_of(errno));
  if (through) return;
  try {
    cut_unfinished_line(path, descriptor_);
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

EventLog::~EventLog() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

void EventLog::write(const ProgressEvent& event) {
  if (descriptor_ < 0) return;
  nlohmann::json object = to_json(event);
  object["time"] = now();
  const std::string line = log_line(object);
  if (::write(descriptor_, line.data(), line.size()) == static_cast<ssize_t>(line.size())) return;
  spdlog::warn("--log-json {}: {}; the rest of the log is left out", path_, message_of(errno));
  ::close(descriptor_);
  descriptor_ = -1;
}

}  // namespace baseq::cli

#pragma once

#include <string>

#include "baseq/pipeline/job.h"

namespace baseq::cli {

/// The file of --log-json: one JSON object a line for every event, with "time" (UTC). Each line is one write, so
/// whenever the process dies the file is valid. A log that exists is continued; a pipe or a device is written through.
class EventLog {
 public:
  /// @param path empty: nothing is written
  /// Throws c10::Error when the file cannot be opened or holds something else.
  explicit EventLog(const std::string& path);
  ~EventLog();
  EventLog(const EventLog&) = delete;
  EventLog& operator=(const EventLog&) = delete;

  /// A failing write is warned of once: a run of hours does not end because its log has no room.
  void write(const ProgressEvent& event);

 private:
  std::string path_;
  int descriptor_ = -1;
};

}  // namespace baseq::cli

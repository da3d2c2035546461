#pragma once

namespace baseq::cli {

/// Opens /dev/null in place of closed standard streams, to be called before any file is opened: a file that got the
/// number of stderr would be written to by every message. Reading such a stdin, or writing to such a stdout or stderr,
/// fails. Returns false where /dev/null cannot be opened.
bool open_closed_streams();

/// Writes what stdout still holds; throws c10::Error when that, or an earlier write, failed.
void flush_stdout();

}  // namespace baseq::cli

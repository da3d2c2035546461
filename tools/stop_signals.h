#pragma once

namespace baseq::cli {

/// From now on what asks a program to end is remembered and does not end it: SIGINT (Ctrl-C), SIGTERM, SIGHUP (the
/// terminal was closed; stays ignored where it is, as under nohup) and SIGPIPE (nobody reads what it prints). A second
/// SIGINT or SIGTERM ends it at once.
void catch_stop_signals();
/// The same, but `forward` gets every such signal, in a signal handler, and none ends the process.
void forward_stop_signals(void (*forward)(int signal));
bool stop_requested();
/// Whether SIGINT alone asked: the user wants this piece of work to end, not the program.
bool only_interrupted();
/// Forgets what was asked. The signals end the program again, until catch_stop_signals().
void release_stop_signals();

}  // namespace baseq::cli

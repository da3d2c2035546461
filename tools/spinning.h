#pragma once

namespace baseq::cli {

/// Makes threads of OpenMP that wait for work give up their core within microseconds. By default they spin for
/// milliseconds: beside one busy process a run takes three times as long as alone, because the threads spin while they
/// wait for the one whose core is taken. libgomp reads the limit from the environment when it is loaded, so the program
/// starts itself again with it, before any work. Does nothing where OMP_WAIT_POLICY or GOMP_SPINCOUNT is set.
void limit_spinning();

}  // namespace baseq::cli

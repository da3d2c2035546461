#pragma once

#include <string>

#include "baseq/cluster/communicator.h"
#include "commands.h"

namespace baseq::cli {

/// The processes that mpirun or srun started together with this one, over MPI; where neither did, this one alone.
/// Throws c10::Error where one of them did and the program was built without MPI.
Communicator started_processes();

/// The same, for a command whose results the first process reports: from here on the others print nothing but errors,
/// and `options` of theirs write no file.
Communicator started_processes(CommonOptions& options);

/// How messages name this process: "process 2: ", and nothing for the first one.
std::string process_prefix();

/// Name and version of the MPI that the program was built with, or "none".
std::string mpi_version();

/// To be called where the program ends. With a status other than 0 it ends the other processes as well, which would
/// wait for this one.
void leave_processes(int exit_status);

}  // namespace baseq::cli

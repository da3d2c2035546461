#include "started_processes.h"

#include <c10/util/Exception.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

#ifdef BASEQ_MPI
#include <mpi.h>

#include <chrono>
#include <thread>
#endif

namespace baseq::cli {
namespace {

/// How many processes were started together, as Open MPI, MPICH and Slurm tell each of them; 1: nothing says so.
int num_started() {
  int most = 1;
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    const char* value = std::getenv(name);
    if (value != nullptr) most = std::max(most, std::atoi(value));
  }
  return most;
}

#ifdef BASEQ_MPI
/// Of one message; MPI counts in int.
constexpr size_t kMostBytes = size_t{1} << 30;

/// Waits without taking the processor from threads that compute: MPI's own functions spin.
void wait(MPI_Request request) {
  constexpr auto kLongest = std::chrono::microseconds(500);
  auto pause = std::chrono::microseconds(1);
  for (int done = 0; MPI_Test(&request, &done, MPI_STATUS_IGNORE), done == 0; pause = std::min(2 * pause, kLongest)) {
    std::this_thread::sleep_for(pause);
  }
}

template <class Start>
void in_parts(size_t num_bytes, const Start& start) {
  for (size_t begin = 0; begin < num_bytes; begin += kMostBytes) {
    MPI_Request request = MPI_REQUEST_NULL;
    start(begin, static_cast<int>(std::min(kMostBytes, num_bytes - begin)), &request);
    wait(request);
  }
}

void send(int64_t to, const void* data, size_t num_bytes) {
  in_parts(num_bytes, [&](size_t begin, int count, MPI_Request* request) {
    MPI_Isend(static_cast<const char*>(data) + begin, count, MPI_BYTE, static_cast<int>(to), 0, MPI_COMM_WORLD,
              request);
  });
}

void receive(int64_t from, void* data, size_t num_bytes) {
  in_parts(num_bytes, [&](size_t begin, int count, MPI_Request* request) {
    MPI_Irecv(static_cast<char*>(data) + begin, count, MPI_BYTE, static_cast<int>(from), 0, MPI_COMM_WORLD, request);
  });
}
#endif

}  // namespace

Communicator started_processes() {
  const int count = num_started();
  if (count == 1) return {};
#ifdef BASEQ_MPI
  int provided = 0;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
  int rank = 0, size = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  TORCH_CHECK(size == count, "MPI has ", size, " processes where ", count,
              " were started: this program was built with the MPI of another launcher (srun: --mpi=list)");
  return {.rank = rank, .size = size, .send = send, .receive = receive};
#else
  TORCH_CHECK(false, count, " processes were started together, but this program was built without MPI and would run ",
              count, " times; build it with -DBASEQ_MPI=ON, or start it once");
#endif
}

Communicator started_processes(CommonOptions& options) {
  Communicator processes = started_processes();
  if (processes.is_first()) return processes;
  TORCH_CHECK(std::freopen("/dev/null", "w", stdout) != nullptr, "cannot open /dev/null");
  spdlog::set_level(spdlog::level::err);
  options.quiet = true;
  options.json = "";
  return processes;
}

std::string process_prefix() {
#ifdef BASEQ_MPI
  int started = 0, rank = 0;
  MPI_Initialized(&started);
  if (started != 0) MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  if (rank > 0) return "process " + std::to_string(rank) + ": ";
#endif
  return "";
}

std::string mpi_version() {
#ifdef BASEQ_MPI
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(text, &length);
  const std::string version(text, static_cast<size_t>(length));
  return version.substr(0, version.find_first_of(",\n"));
#else
  return "none";
#endif
}

void leave_processes([[maybe_unused]] int exit_status) {
#ifdef BASEQ_MPI
  int started = 0;
  MPI_Initialized(&started);
  if (started == 0) return;
  if (exit_status != 0) MPI_Abort(MPI_COMM_WORLD, exit_status);
  MPI_Finalize();
#endif
}

}  // namespace baseq::cli

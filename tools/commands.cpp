#include "commands.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <fmt/format.h>
#include <malloc.h>
#include <torch/version.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdlib>

#include "baseq/pipeline/recipe.h"
#include "baseq/version.h"
#include "help.h"
#include "io/hub_cache.h"
#include "io/json_object.h"
#include "io/machine_limits.h"
#include "output_files.h"
#include "spinning.h"
#include "started_processes.h"

namespace baseq::cli {

namespace {

CLI::Validator checkpoint_validator(bool file) {
  return CLI::Validator(
      [file](std::string& model) {
        std::error_code error;
        if (std::filesystem::is_regular_file(model, error)) {
          if (file) return std::string();
          const bool gguf = std::filesystem::path(model).extension() == ".gguf";
          return model + " is a file; expected the directory of a checkpoint in safetensors" +
                 (gguf ? " (eval, compare, inspect and export read GGUF files)" : "");
        }
        try {
          model = resolve_checkpoint(model).string();
          return std::string();
        } catch (const c10::Error& failure) {
          return std::string(failure.what_without_backtrace());
        }
      },
      "MODEL");
}

/// Of a number without sign that fits in 64 bits; CLI11 takes others and wraps them.
CLI::Validator unsigned_number() {
  return CLI::Validator(
      [](std::string& text) {
        uint64_t value = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
        const bool all = error == std::errc() && end == text.data() + text.size();
        return all ? std::string() : fmt::format("{} is not an integer from 0 to {}", text, UINT64_MAX);
      },
      "N");
}

CLI::Validator device_name() {
  return CLI::Validator(
      [](std::string& text) {
        const std::string index = text.starts_with("cuda:") ? text.substr(5) : "0";
        const bool digits = !index.empty() && index.size() < 3 && index.find_first_not_of("0123456789") == index.npos;
        const bool known = digits && (text == "cpu" || text.starts_with("cuda:") || text == "cuda");
        return known ? std::string() : text + " is not a device; expected cpu, cuda, or one of several as cuda:1";
      },
      "DEVICE");
}

/// OMP_NUM_THREADS, or what LibTorch takes, at most what the process may use: LibTorch does not see quotas.
int default_threads() {
  const int threads = at::get_num_threads();
  const char* wanted = std::getenv("OMP_NUM_THREADS");
  return wanted != nullptr && *wanted != '\0' ? threads : std::min(threads, usable_cpus());
}

}  // namespace

CLI::Validator input_file() {
  return CLI::Validator(
      [](std::string& file) {
        if (file == "-") file = "/dev/stdin";
        return CLI::ExistingFile(file);
      },
      "FILE");
}

CLI::Validator recipe_name() {
  return CLI::Validator(
      [](std::string& recipe) {
        if (recipe == "-") recipe = "/dev/stdin";
        std::error_code error;
        const bool directory = std::filesystem::is_directory(recipe, error);
        if (!directory && std::filesystem::exists(recipe, error)) return std::string();
        try {
          read_recipe_json(recipe);
          return std::string();
        } catch (const c10::Error& failure) {
          return std::string(failure.what_without_backtrace()) + " (baseq recipes lists those that are built in)";
        }
      },
      "NAME|FILE");
}

CLI::Validator output_file() {
  return CLI::Validator(
      [](std::string& file) {
        if (file == "-") file = "/dev/stdout";
        return std::string();
      },
      "FILE");
}

CLI::Validator memory_size() {
  return CLI::Validator(
      [](std::string& text) {
        double value = 0;
        const char* const last = text.data() + text.size();
        const auto [end, error] = std::from_chars(text.data(), last, value, std::chars_format::fixed);
        std::string unit(end, last);
        for (char& c : unit) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
        if (unit.ends_with("B")) unit.pop_back();
        if (unit.ends_with("I")) unit.pop_back();
        const size_t power = unit.empty() ? 0 : std::string("KMGTP").find(unit) + 1;
        const double bytes = std::floor(std::ldexp(value, static_cast<int>(10 * power)));
        if (error != std::errc() || unit.size() > 1 || (power == 0 && !unit.empty()) || !(bytes >= 1 && bytes < 9e18)) {
          return text + " is not a size; expected one such as 8G, 1.5G or 500M";
        }
        text = std::to_string(static_cast<uint64_t>(bytes));
        return std::string();
      },
      "SIZE");
}

CLI::Validator memory_sizes() {
  return CLI::Validator(
      [](std::string& text) {
        const std::string place = text.starts_with(kGpuMemory) ? kGpuMemory : "";
        std::string size = text.substr(place.size());
        std::string error = memory_size()(size);
        text = place + size;
        return error;
      },
      "SIZE|gpu=SIZE");
}

CLI::Validator checkpoint_directory() { return checkpoint_validator(/*file=*/false); }
CLI::Validator checkpoint_path() { return checkpoint_validator(/*file=*/true); }

void add_common_options(CLI::App& command, CommonOptions& options, const Obeyed& obeyed) {
  begin_group(command, "Run and results");
  if (obeyed.device) {
    command.add_option("--device", options.device, "Where to compute: cpu or cuda (cuda:1, ...)")
        ->capture_default_str()
        ->check(device_name());
  }
  if (obeyed.threads) {
    command.add_option("--threads", options.threads, "CPU threads (default: as many as this process may use)")
        ->check(CLI::Range(1, 4096));
  }
  if (obeyed.seed) {
    command.add_option("--seed", options.seed, "Seed of every random choice")
        ->capture_default_str()
        ->check(unsigned_number());
  }
  command.add_option("--json", options.json, "Write the results to this file as JSON; - is stdout")
      ->transform(output_file());
  if (obeyed.quiet) command.add_flag("--quiet", options.quiet, "No progress on stderr, only warnings and errors");
}

std::string describe_version() {
  std::string devices = "cpu";
  constexpr at::DeviceType kCuda = at::DeviceType::CUDA;
  const int num_cuda = c10::impl::hasDeviceGuardImpl(kCuda) ? c10::impl::getDeviceGuardImpl(kCuda)->deviceCount() : 0;
  for (int i = 0; i < num_cuda; ++i) devices += fmt::format(" cuda:{}", i);
  return fmt::format(
      "baseq {}\nLibTorch         {}\ninstruction set  {}\nthreads          {}\ndevices          {}\n"
      "MPI              {}",
      version(), TORCH_VERSION, instruction_set(), default_threads(), devices, mpi_version());
}

at::Device apply(const CommonOptions& options) {
  at::set_num_threads(options.threads > 0 ? options.threads : default_threads());
  if (at::get_num_threads() > 1) limit_spinning();
  const at::Device device(options.device);
  TORCH_CHECK(device.is_cpu() || (device.is_cuda() && at::hasCUDA()), "--device ", options.device,
              ": this LibTorch offers cpu", at::hasCUDA() ? " and cuda" : " only");
  return device;
}

void write_json(const CommonOptions& options, nlohmann::json object) {
  if (options.json.empty()) return;
  object["baseq"] = version();
  check_output_file("--json", options.json, kJsonMark);  // again: the work may have taken hours
  write_json_file(options.json, object);
}

void keep_freed_memory() {
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);
}

void return_freed_memory(int num_bytes) {
  mallopt(M_MMAP_MAX, 1 << 16);
  mallopt(M_MMAP_THRESHOLD, num_bytes);
}

void release_free_memory() { malloc_trim(0); }

}  // namespace baseq::cli

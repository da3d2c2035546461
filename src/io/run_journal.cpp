#include "baseq/io/run_journal.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/file.h>
#include <unistd.h>
#include <zlib.h>

#include <cerrno>

#include "baseq/io/json_object.h"
#include "baseq/io/safetensors.h"
#include "files.h"
#include "strict_json.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char* kWho = "work directory";
constexpr const char* kRun = "run.json";
constexpr const char* kInputs = "inputs.safetensors";
constexpr const char* kJournal = "journal.json";
constexpr const char* kLock = "lock";

uint32_t crc32_of(const fs::path& path) {
  const FileDescriptor file = open_regular_file(kWho, path);
  std::string buffer(size_t{1} << 20, '\0');
  uLong crc = ::crc32(0, nullptr, 0);
  while (const size_t count = read_bytes(kWho, file, path, buffer.data(), buffer.size())) {
    crc = ::crc32(crc, reinterpret_cast<const Bytef*>(buffer.data()), static_cast<uInt>(count));
  }
  return static_cast<uint32_t>(crc);
}

RunJournal::Tensors tensors_of(const fs::path& path) {
  const SafetensorsFile file(path);
  RunJournal::Tensors tensors;
  for (const std::string& name : file.names()) tensors[name] = file.tensor(name);
  return tensors;
}

/// "recipe/weights/num_bits (4, now 3)" for every value that is not the same in both.
std::vector<std::string> differences(const json& was, const json& is) {
  const auto show = [](const json& flat, const std::string& key) {
    return flat.contains(key) ? flat.at(key).dump() : std::string("absent");
  };
  const json before = was.flatten(), now = is.flatten();
  json keys = before;
  keys.update(now);
  std::vector<std::string> found;
  for (const auto& [key, value] : keys.items()) {
    if (show(before, key) != show(now, key)) {
      found.push_back(fmt::format("{} ({}, now {})", key.substr(1), show(before, key), show(now, key)));
    }
  }
  return found;
}

uint32_t crc32_of_json(const json& value) {
  const std::string text = value.dump();
  return static_cast<uint32_t>(::crc32(0, reinterpret_cast<const Bytef*>(text.data()), static_cast<uInt>(text.size())));
}

void check_intact(bool intact, const fs::path& path) {
  TORCH_CHECK(intact, kWho, ": ", path.string(),
              " is damaged: its size or checksum is not the one that was written; the run cannot be continued");
}

bool belongs_to_a_run(const std::string& name) {
  return name == kRun || name == kInputs || name == kJournal || name == kLock || name.starts_with("step-") ||
         name.starts_with("state-") || name.ends_with(".tmp");
}

}  // namespace

RunJournal::Description RunJournal::describe(const fs::path& directory) {
  const fs::path path = directory / kRun;
  TORCH_CHECK(path_exists(kWho, path), kWho, ": ", directory.string(), " holds no run (no ", kRun, ")");
  json run = read_json_file(path.string());
  TORCH_CHECK(run.is_object() && run.contains("identity") && run.contains("details") && run.contains("inputs"), kWho,
              ": ", path.string(), " is not the description of a run");
  const json sum = run.value("crc32", json());
  run.erase("crc32");
  check_intact(sum == crc32_of_json(run), path);
  check_intact(run["inputs"] == crc32_of(directory / kInputs), directory / kInputs);
  return {run["identity"], run["details"], tensors_of(directory / kInputs)};
}

RunJournal::RunJournal(const fs::path& directory, const Description& description) : directory_(directory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) throw_system_error(kWho, "create", directory, error.value());
  for (const auto& entry : fs::directory_iterator(directory)) {
    TORCH_CHECK(belongs_to_a_run(entry.path().filename().string()), kWho, ": ", directory.string(), " holds ",
                entry.path().filename().string(), ", which belongs to no run; choose an empty or a new directory");
  }
  lock_ = ::open((directory / kLock).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (lock_ < 0) throw_system_error(kWho, "create", directory / kLock, errno);
  try {
    TORCH_CHECK(::flock(lock_, LOCK_EX | LOCK_NB) == 0, kWho, ": another process works in ", directory.string());
    if (!path_exists(kWho, directory / kRun)) {
      save_safetensors(directory / kInputs, description.inputs);
      json run{{"identity", description.identity},
               {"details", description.details},
               {"inputs", crc32_of(directory / kInputs)}};
      run["crc32"] = crc32_of_json(run);
      write_json_file(directory / kRun, run);
      sync_directory(kWho, directory);
      return;
    }
    const Description was = describe(directory);
    const std::vector<std::string> changed = differences(was.identity, description.identity);
    TORCH_CHECK(changed.empty(), kWho, ": ", directory.string(),
                " holds another run; what differs: ", fmt::format("{}", fmt::join(changed, ", ")),
                "; choose another directory or start over without it");
    bool same_inputs = was.inputs.size() == description.inputs.size();
    for (const auto& [name, tensor] : description.inputs) {
      same_inputs = same_inputs && was.inputs.contains(name) && at::equal(was.inputs.at(name), tensor);
    }
    TORCH_CHECK(same_inputs, kWho, ": ", directory.string(), " holds a run with other inputs (calibration data)");
    read_journal();
  } catch (...) {
    ::close(lock_);
    throw;
  }
}

RunJournal::~RunJournal() { ::close(lock_); }

void RunJournal::read_journal() {
  if (!path_exists(kWho, directory_ / kJournal)) return;
  const std::string path = (directory_ / kJournal).string();
  const json journal = read_json_file(path);
  JsonObject object(journal, path);
  const auto read = [&](const json& value) {
    JsonObject file(value, path);
    constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
    File result{.name = file.text("name", ""), .num_bytes = file.integer("num_bytes", 0, 0, kMax)};
    result.crc32 = static_cast<uint32_t>(file.integer("crc32", 0, 0, std::numeric_limits<uint32_t>::max()));
    TORCH_CHECK(is_plain_name(result.name), kWho, ": ", path, " names ", quote(result.name));
    const fs::path where = directory_ / result.name;
    const FileDescriptor opened = open_regular_file(kWho, where);
    check_intact(
        static_cast<int64_t>(size_of(kWho, opened, where)) == result.num_bytes && crc32_of(where) == result.crc32,
        where);
    return result;
  };
  TORCH_CHECK(journal.contains("steps") && journal["steps"].is_array() && journal.contains("state"), kWho, ": ", path,
              " is not a journal");
  for (const json& step : journal["steps"]) {
    steps_.push_back(read(step));
    notes_.push_back(step.value("notes", json()));
  }
  state_ = read(journal["state"]);
}

void RunJournal::write_journal() const {
  const auto entry = [](const File& file) {
    return json{{"name", file.name}, {"num_bytes", file.num_bytes}, {"crc32", file.crc32}};
  };
  json steps = json::array();
  for (size_t i = 0; i < steps_.size(); ++i) {
    steps.push_back(entry(steps_[i]));
    if (!notes_[i].is_null()) steps.back()["notes"] = notes_[i];
  }
  write_json_file(directory_ / kJournal, {{"steps", std::move(steps)}, {"state", entry(state_)}});
  sync_directory(kWho, directory_);
}

RunJournal::File RunJournal::save(const std::string& name, const Tensors& tensors) const {
  const fs::path path = directory_ / name;
  save_safetensors(path, tensors);
  const FileDescriptor file = open_regular_file(kWho, path);
  return {name, static_cast<int64_t>(size_of(kWho, file, path)), crc32_of(path)};
}

RunJournal::Tensors RunJournal::load(const File& file) const { return tensors_of(directory_ / file.name); }

RunJournal::Tensors RunJournal::step(int64_t index) const { return load(steps_.at(static_cast<size_t>(index))); }

RunJournal::Tensors RunJournal::state() const { return steps_.empty() ? Tensors{} : load(state_); }

void RunJournal::finish_step(const Tensors& result, const Tensors& state, const json& notes) {
  const std::string previous = state_.name;
  steps_.push_back(save(fmt::format("step-{:05}.safetensors", num_steps()), result));
  notes_.push_back(notes);
  state_ = save(fmt::format("state-{:05}.safetensors", num_steps()), state);
  write_journal();
  std::error_code ignored;
  if (!previous.empty()) fs::remove(directory_ / previous, ignored);
}

}  // namespace baseq

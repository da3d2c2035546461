#include "baseq/io/run_journal.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/file.h>
#include <unistd.h>
#include <zlib.h>

#include <cerrno>
#include <set>

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

void write_with_checksum(const fs::path& path, json object) {
  object["crc32"] = crc32_of_json(object);
  write_json_file(path, object);
}

json read_with_checksum(const fs::path& path) {
  json object = read_json_file(path.string());
  TORCH_CHECK(object.is_object(), kWho, ": ", path.string(), " is not a JSON object");
  const json sum = object.value("crc32", json());
  object.erase("crc32");
  check_intact(sum == crc32_of_json(object), path);
  return object;
}

bool belongs_to_a_run(const std::string& name) {
  return name == kRun || name == kInputs || name == kJournal || name == kLock || name.starts_with("step-") ||
         name.starts_with("state-") || name.starts_with("partial-") || name.ends_with(".tmp");
}

}  // namespace

uint32_t crc32_of_file(const fs::path& path) {
  const FileDescriptor file = open_regular_file(kWho, path);
  std::string buffer(size_t{1} << 20, '\0');
  uLong crc = ::crc32(0, nullptr, 0);
  while (const size_t count = read_bytes(kWho, file, path, buffer.data(), buffer.size())) {
    crc = ::crc32(crc, reinterpret_cast<const Bytef*>(buffer.data()), static_cast<uInt>(count));
  }
  return static_cast<uint32_t>(crc);
}

bool RunJournal::exists(const fs::path& directory) { return path_exists(kWho, directory / kRun); }

RunJournal::Description RunJournal::describe(const fs::path& directory) {
  const fs::path path = directory / kRun;
  TORCH_CHECK(exists(directory), kWho, ": ", directory.string(), " holds no run (no ", kRun, ")");
  const json run = read_with_checksum(path);
  TORCH_CHECK(run.contains("identity") && run.contains("details") && run.contains("inputs"), kWho, ": ", path.string(),
              " is not the description of a run");
  check_intact(run["inputs"] == crc32_of_file(directory / kInputs), directory / kInputs);
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
    const auto write_run = [&] {
      write_with_checksum(directory / kRun, {{"identity", description.identity},
                                             {"details", description.details},
                                             {"inputs", crc32_of_file(directory / kInputs)}});
      sync_directory(kWho, directory);
    };
    if (!exists(directory)) {
      save_safetensors(directory / kInputs, description.inputs);
      write_run();
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
    remove_leftovers();
    if (was.details != description.details) write_run();
  } catch (...) {
    ::close(lock_);
    throw;
  }
}

RunJournal::~RunJournal() { ::close(lock_); }

void RunJournal::read_journal() {
  if (!path_exists(kWho, directory_ / kJournal)) return;
  const std::string path = (directory_ / kJournal).string();
  const json journal = read_with_checksum(path);
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
        static_cast<int64_t>(size_of(kWho, opened, where)) == result.num_bytes && crc32_of_file(where) == result.crc32,
        where);
    return result;
  };
  TORCH_CHECK(journal.contains("steps") && journal["steps"].is_array(), kWho, ": ", path, " is not a journal");
  for (const json& step : journal["steps"]) {
    steps_.push_back(read(step));
    notes_.push_back(step.value("notes", json()));
  }
  if (object.contains("state")) state_ = read(journal["state"]);
  TORCH_CHECK(state_.has_value() == !steps_.empty(), kWho, ": ", path, " is not a journal");
  if (!object.contains("partial")) return;
  partial_ = read(journal["partial"]);
  partial_notes_ = journal["partial"].value("notes", json());
  num_partials_ = JsonObject(journal["partial"], path).integer("number", 0, 0, std::numeric_limits<int64_t>::max());
}

void RunJournal::write_journal() const {
  const auto entry = [](const File& file, const json& notes) {
    json result{{"name", file.name}, {"num_bytes", file.num_bytes}, {"crc32", file.crc32}};
    if (!notes.is_null()) result["notes"] = notes;
    return result;
  };
  json journal{{"steps", json::array()}};
  for (size_t i = 0; i < steps_.size(); ++i) journal["steps"].push_back(entry(steps_[i], notes_[i]));
  if (state_) journal["state"] = entry(*state_, {});
  if (partial_) {
    journal["partial"] = entry(*partial_, partial_notes_);
    journal["partial"]["number"] = num_partials_;
  }
  write_with_checksum(directory_ / kJournal, std::move(journal));
  sync_directory(kWho, directory_);
}

void RunJournal::remove_leftovers() const {
  std::set<std::string> named{kRun, kInputs, kJournal, kLock};
  for (const File& step : steps_) named.insert(step.name);
  if (state_) named.insert(state_->name);
  if (partial_) named.insert(partial_->name);
  std::vector<fs::path> leftovers;
  for (const auto& entry : fs::directory_iterator(directory_)) {
    if (!named.contains(entry.path().filename().string())) leftovers.push_back(entry.path());
  }
  std::error_code ignored;
  for (const fs::path& path : leftovers) fs::remove(path, ignored);
}

RunJournal::File RunJournal::save(const std::string& name, const Tensors& tensors) const {
  const fs::path path = directory_ / name;
  save_safetensors(path, tensors);
  const FileDescriptor file = open_regular_file(kWho, path);
  return {name, static_cast<int64_t>(size_of(kWho, file, path)), crc32_of_file(path)};
}

RunJournal::Tensors RunJournal::load(const File& file) const { return tensors_of(directory_ / file.name); }

RunJournal::Tensors RunJournal::step(int64_t index) const { return load(steps_.at(static_cast<size_t>(index))); }

RunJournal::Tensors RunJournal::state() const { return state_ ? load(*state_) : Tensors{}; }

void RunJournal::finish_step(const Tensors& result, const Tensors& state, const json& notes) {
  steps_.push_back(save(fmt::format("step-{:05}.safetensors", num_steps()), result));
  notes_.push_back(notes);
  state_ = save(fmt::format("state-{:05}.safetensors", num_steps()), state);
  partial_.reset();
  num_partials_ = 0;
  write_journal();
  remove_leftovers();
}

std::optional<RunJournal::Partial> RunJournal::partial() const {
  if (!partial_) return std::nullopt;
  return Partial{load(*partial_), partial_notes_};
}

void RunJournal::save_partial(const Tensors& tensors, const json& notes) {
  // A name of its own: until the journal names the new one, the one before counts.
  ++num_partials_;
  partial_ = save(fmt::format("partial-{:05}-{}.safetensors", num_steps(), num_partials_), tensors);
  partial_notes_ = notes;
  write_journal();
  remove_leftovers();
}

}  // namespace baseq

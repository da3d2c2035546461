#include "io/run_journal.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <zlib.h>

#include <set>

#include "baseq/io/checkpoint.h"
#include "files.h"
#include "io/json_object.h"
#include "safetensors_layout.h"
#include "strict_json.h"

namespace baseq {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr const char* kWorkDirectory = "work directory";
constexpr const char* kRun = "run.json";
constexpr const char* kInputs = "inputs.safetensors";
constexpr const char* kJournal = "journal.json";
constexpr const char* kLock = "lock";
// Of the files and what journal.json says of them.
constexpr int64_t kJournalVersion = 3;

RunJournal::Tensors tensors_of(const fs::path& path) {
  const SafetensorsFile file(path);
  RunJournal::Tensors tensors;
  for (const std::string& name : file.names()) tensors[name] = file.tensor(name);
  return tensors;
}

uint32_t crc32_of_json(const json& value) {
  const std::string text = value.dump();
  return static_cast<uint32_t>(::crc32(0, reinterpret_cast<const Bytef*>(text.data()), static_cast<uInt>(text.size())));
}

void check_intact(bool intact, const fs::path& path) {
  TORCH_CHECK(intact, kWorkDirectory, ": ", path.string(),
              " is damaged: its size or checksum is not the one that was written; the run cannot be continued");
}

/// Durable, and so is every file of its directory by then: a file system need not keep the order of renames.
void replace_json(const fs::path& path, json object) {
  object["crc32"] = crc32_of_json(object);
  sync_directory(kWorkDirectory, path.parent_path());
  write_json_file(path, object);
  sync_directory(kWorkDirectory, path.parent_path());
}

json read_with_checksum(const fs::path& path) {
  json object = read_json_file(path.string());
  TORCH_CHECK(object.is_object(), kWorkDirectory, ": ", path.string(), " is not a JSON object");
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

uint32_t crc32_of_file(const fs::path& path) {
  const FileDescriptor file = open_regular_file(kWorkDirectory, path);
  std::string buffer(size_t{1} << 20, '\0');
  uLong crc = ::crc32(0, nullptr, 0);
  while (const size_t count = read_bytes(kWorkDirectory, file, path, buffer.data(), buffer.size())) {
    crc = ::crc32(crc, reinterpret_cast<const Bytef*>(buffer.data()), static_cast<uInt>(count));
  }
  return static_cast<uint32_t>(crc);
}

bool RunJournal::is_held(const fs::path& directory) { return LockFile::is_held(directory / kLock); }

bool RunJournal::exists(const fs::path& directory) { return path_exists(kWorkDirectory, directory / kRun); }

RunJournal::Description RunJournal::describe(const fs::path& directory) {
  const fs::path path = directory / kRun;
  TORCH_CHECK(exists(directory), kWorkDirectory, ": ", directory.string(), " holds no run (no ", kRun, ")");
  const json run = read_with_checksum(path);
  TORCH_CHECK(run.value("journal_version", json()) == kJournalVersion, kWorkDirectory, ": ", directory.string(),
              " was begun by another version of this program; finish it with that one, or start over in another "
              "directory");
  TORCH_CHECK(run.contains("identity") && run.contains("details") && run.contains("inputs"), kWorkDirectory, ": ",
              path.string(), " is not the description of a run");
  check_intact(run["inputs"] == crc32_of_file(directory / kInputs), directory / kInputs);
  return {run["identity"], run["details"], tensors_of(directory / kInputs)};
}

RunJournal::RunJournal(const fs::path& directory, const Description& description) : directory_(directory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) throw_system_error(kWorkDirectory, "create", directory, error.value());
  for (const auto& entry : fs::directory_iterator(directory)) {
    TORCH_CHECK(belongs_to_a_run(entry.path().filename().string()), kWorkDirectory, ": ", directory.string(), " holds ",
                entry.path().filename().string(), ", which belongs to no run; choose an empty or a new directory");
  }
  lock_.emplace(kWorkDirectory, directory / kLock, "another process works in " + directory.string());
  const auto write_run = [&](uint32_t inputs_crc32) {
    replace_json(directory / kRun, {{"journal_version", kJournalVersion},
                                    {"identity", description.identity},
                                    {"details", description.details},
                                    {"inputs", inputs_crc32}});
  };
  if (!exists(directory)) {
    write_run(save(kInputs, description.inputs).crc32);
    return;
  }
  const Description was = describe(directory);
  const std::vector<std::string> changed = differences(was.identity, description.identity);
  TORCH_CHECK(changed.empty(), kWorkDirectory, ": ", directory.string(),
              " holds another run; what differs: ", fmt::format("{}", fmt::join(changed, ", ")),
              "; choose another directory or start over without it");
  bool same_inputs = was.inputs.size() == description.inputs.size();
  for (const auto& [name, tensor] : description.inputs) {
    same_inputs = same_inputs && was.inputs.contains(name) && at::equal(was.inputs.at(name), tensor);
  }
  TORCH_CHECK(same_inputs, kWorkDirectory, ": ", directory.string(),
              " holds a run with other inputs (calibration data)");
  read_journal();
  remove_leftovers();
  if (was.details != description.details) write_run(crc32_of_file(directory / kInputs));
}

void RunJournal::read_journal() {
  if (!path_exists(kWorkDirectory, directory_ / kJournal)) return;
  const std::string path = (directory_ / kJournal).string();
  const json journal = read_with_checksum(path);
  JsonObject object(journal, path);
  const auto read = [&](const json& value) {
    JsonObject file(value, path);
    constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
    File result{.name = file.text("name", ""), .num_bytes = file.integer("num_bytes", 0, 0, kMax)};
    result.crc32 = static_cast<uint32_t>(file.integer("crc32", 0, 0, std::numeric_limits<uint32_t>::max()));
    TORCH_CHECK(is_plain_name(result.name), kWorkDirectory, ": ", path, " names ", quote(result.name));
    const fs::path where = directory_ / result.name;
    const FileDescriptor opened = open_regular_file(kWorkDirectory, where);
    check_intact(static_cast<int64_t>(size_of(kWorkDirectory, opened, where)) == result.num_bytes &&
                     crc32_of_file(where) == result.crc32,
                 where);
    return result;
  };
  TORCH_CHECK(journal.contains("steps") && journal["steps"].is_array(), kWorkDirectory, ": ", path,
              " is not a journal");
  for (const json& step : journal["steps"]) {
    steps_.push_back(read(step));
    notes_.push_back(step.value("notes", json()));
  }
  TORCH_CHECK(journal.contains("state") && journal["state"].is_object(), kWorkDirectory, ": ", path,
              " is not a journal");
  for (const auto& [name, value] : journal["state"].items()) {
    const int64_t finished = JsonObject(value, path).integer("num_steps", 0, 1, num_steps());
    state_.emplace(name, StateFile{read(value), finished});
  }
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
  journal["state"] = json::object();
  for (const auto& [name, kept] : state_) {
    journal["state"][name] = entry(kept.file, {});
    journal["state"][name]["num_steps"] = kept.num_steps;
  }
  if (partial_) {
    journal["partial"] = entry(*partial_, partial_notes_);
    journal["partial"]["number"] = num_partials_;
  }
  replace_json(directory_ / kJournal, std::move(journal));
}

void RunJournal::remove_leftovers() const {
  std::set<std::string> named{kRun, kInputs, kJournal, kLock};
  for (const File& step : steps_) named.insert(step.name);
  for (const auto& [name, kept] : state_) named.insert(kept.file.name);
  if (partial_) named.insert(partial_->name);
  std::vector<fs::path> leftovers;
  for (const auto& entry : fs::directory_iterator(directory_)) {
    if (!named.contains(entry.path().filename().string())) leftovers.push_back(entry.path());
  }
  std::error_code ignored;
  for (const fs::path& path : leftovers) fs::remove(path, ignored);
}

RunJournal::File RunJournal::save(const std::string& name, const Tensors& tensors) const {
  const StoredFile file = write_safetensors(directory_ / name, tensors, {{"format", "pt"}});
  return {name, file.num_bytes, file.crc32};
}

RunJournal::Tensors RunJournal::load(const File& file) const { return tensors_of(directory_ / file.name); }

RunJournal::Tensors RunJournal::step(int64_t index) const { return load(steps_.at(static_cast<size_t>(index))); }

std::map<std::string, RunJournal::State> RunJournal::state() const {
  std::map<std::string, State> state;
  for (const auto& [name, kept] : state_) state[name] = {load(kept.file).at(name), kept.num_steps};
  return state;
}

void RunJournal::finish_step(const Tensors& result, const Tensors& state, const json& notes) {
  steps_.push_back(save(fmt::format("step-{:05}.safetensors", num_steps()), result));
  notes_.push_back(notes);
  for (const auto& [name, tensor] : state) {
    TORCH_CHECK(is_plain_name(name), kWorkDirectory, ": ", quote(name), " cannot be the name of a state");
    const std::string file = fmt::format("state-{:05}-{}.safetensors", num_steps(), name);
    state_.insert_or_assign(name, StateFile{save(file, {{name, tensor}}), num_steps()});
  }
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

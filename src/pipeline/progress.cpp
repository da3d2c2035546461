#include <sys/resource.h>

#include <cfloat>
#include <cmath>
#include <type_traits>
#include <utility>

#include "baseq/pipeline/job.h"
#include "io/json_object.h"

namespace baseq {
namespace {

using nlohmann::json;

/// A block, or all of them.
struct Place {
  int64_t& block;
};

// The fields of every event, once for writing and reading.
template <class Visit>
void fields(RunStarted& e, Visit visit) {
  visit("model", e.model), visit("num_blocks", e.num_blocks), visit("num_samples", e.num_samples);
  visit("seq_len", e.seq_len), visit("seed", e.seed), visit("device", e.device), visit("num_threads", e.num_threads);
}
template <class Visit>
void fields(RunResumed& e, Visit visit) {
  visit("num_finished", e.num_finished), visit("num_blocks", e.num_blocks), visit("stage", e.stage);
}
template <class Visit>
void fields(BlockStarted& e, Visit visit) {
  visit("block", Place{e.block}), visit("num_blocks", e.num_blocks), visit("pass", e.pass);
}
template <class Visit>
void fields(LinearRounded& e, Visit visit) {
  visit("block", Place{e.block}), visit("name", e.name), visit("relative_error", e.relative_error);
  visit("damping", e.damping), visit("seconds", e.seconds);
}
template <class Visit>
void fields(EpochLearned& e, Visit visit) {
  visit("block", Place{e.block}), visit("stage", e.stage), visit("epoch", e.epoch), visit("num_epochs", e.num_epochs);
  visit("loss", e.loss);
}
template <class Visit>
void fields(StageLearned& e, Visit visit) {
  visit("block", Place{e.block}), visit("stage", e.stage), visit("loss_before", e.loss_before);
  visit("loss_after", e.loss_after), visit("seconds", e.seconds);
}
template <class Visit>
void fields(ActivationRange& e, Visit visit) {
  visit("min", e.min), visit("max", e.max), visit("rms", e.rms), visit("peak", e.peak);
  visit("difficulty", e.difficulty);
}
template <class Visit>
void fields(PointMeasured& e, Visit visit) {
  visit("block", Place{e.block}), visit("name", e.name), visit("before", e.before), visit("after", e.after);
  visit("enabled", e.enabled), visit("clip", e.clip), visit("min_gain", e.min_gain), visit("max_gain", e.max_gain);
  visit("max_shift", e.max_shift);
}
template <class Visit>
void fields(BlockFinished& e, Visit visit) {
  visit("block", Place{e.block}), visit("num_blocks", e.num_blocks), visit("relative_error", e.relative_error);
  visit("seconds", e.seconds), visit("peak_memory_bytes", e.peak_memory_bytes);
}
template <class Visit>
void fields(Warning& e, Visit visit) {
  visit("message", e.message);
}
template <class Visit>
void fields(RunFinished& e, Visit visit) {
  visit("seconds", e.seconds);
}

template <class Visit>
void fields(TransformChosen& e, Visit visit) {
  visit("block", e.block), visit("site", e.site), visit("chosen", e.chosen), visit("chain", e.chain);
  visit("scores", e.scores);
}

/// By the index in ProgressEvent.
constexpr const char* kKinds[] = {"run_started",   "run_resumed",   "block_started",   "linear_rounded",
                                  "epoch_learned", "stage_learned", "point_measured",  "block_finished",
                                  "warning",       "run_finished",  "transform_chosen"};
static_assert(std::size(kKinds) == std::variant_size_v<ProgressEvent>);

struct EventWriter {
  json& object;

  static json number(double value) { return std::isfinite(value) ? json(value) : json(nullptr); }
  void operator()(const char* key, double value) const { object[key] = number(value); }
  void operator()(const char* key, const std::optional<double>& value) const {
    if (value) object[key] = number(*value);
  }
  void operator()(const char* key, const std::vector<double>& values) const {
    object[key] = json::array();
    for (const double value : values) object[key].push_back(number(value));
  }
  void operator()(const char* key, ActivationRange& range) const { fields(range, EventWriter{object[key]}); }
  void operator()(const char* key, Place place) const {
    object[key] = place.block == kWholeModel ? json("model") : json(place.block);
  }
  template <class Value>
  void operator()(const char* key, const Value& value) const {
    object[key] = value;
  }
};

struct EventReader {
  const json& value;
  JsonObject& object;

  void operator()(const char* key, int64_t& result) const { result = object.integer(key, 0, INT64_MIN, INT64_MAX); }
  void operator()(const char* key, uint64_t& result) const {
    const auto it = value.find(key);
    result = it != value.end() && it->is_number_unsigned()
                 ? it->get<uint64_t>()
                 : static_cast<uint64_t>(object.integer(key, 0, INT64_MIN, INT64_MAX));
  }
  void operator()(const char* key, Place place) const {
    const auto it = value.find(key);
    const bool whole = it != value.end() && *it == "model";
    if (whole) object.ignore(key);
    place.block = whole ? kWholeModel : object.integer(key, 0, INT64_MIN, INT64_MAX);
  }
  void operator()(const char* key, double& result) const { result = object.number(key, NAN, -DBL_MAX, DBL_MAX); }
  void operator()(const char* key, bool& result) const { result = object.boolean(key, false); }
  void operator()(const char* key, std::string& result) const { result = object.text(key, ""); }
  void operator()(const char* key, std::vector<double>& result) const {
    result = object.numbers(key, -DBL_MAX, DBL_MAX);
  }
  void operator()(const char* key, std::optional<double>& result) const {
    if (object.contains(key)) result = object.number(key, 0, -DBL_MAX, DBL_MAX);
  }
  void operator()(const char* key, ActivationRange& result) const {
    JsonObject range = object.object(key);
    fields(result, EventReader{value.at(key), range});
  }
};

template <size_t kIndex = 0>
std::optional<ProgressEvent> read_event(const std::string& kind, const json& value, JsonObject& object) {
  if constexpr (kIndex < std::variant_size_v<ProgressEvent>) {
    if (kind != kKinds[kIndex]) return read_event<kIndex + 1>(kind, value, object);
    std::variant_alternative_t<kIndex, ProgressEvent> event{};
    fields(event, EventReader{value, object});
    return event;
  }
  return std::nullopt;
}

}  // namespace

json to_json(const ProgressEvent& event) {
  json object{{"event", kKinds[event.index()]}};
  std::visit([&](auto fields_of) { fields(fields_of, EventWriter{object}); }, event);
  return object;
}

std::optional<ProgressEvent> progress_event_from_json(const json& value, const std::string& path) {
  JsonObject object(value, path);
  return read_event(object.text("event", ""), value, object);
}

int64_t peak_memory_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace baseq

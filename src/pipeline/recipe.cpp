#include "baseq/pipeline/recipe.h"

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "baseq/pipeline/activations.h"

namespace baseq {
namespace {

using nlohmann::json;

const std::vector<std::string> kRoundings = {"rtn", "gptq"};
const std::vector<std::string> kLowRankMethods = {"svd", "l2qer", "qera-approx", "qera-exact", "fbquant"};
const std::vector<std::string> kFbquantStarts = {"qera", "zero", "svd"};

constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kHalf, at::kBFloat16};
constexpr at::ScalarType kFactorDtypes[] = {at::kFloat, at::kHalf, at::kBFloat16, at::kChar};

std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kChar:
      return "int8";
    default:
      TORCH_INTERNAL_ASSERT(false, "no recipe names ", dtype);
  }
}

at::ScalarType read_dtype(JsonObject& object, const char* key, at::ScalarType fallback,
                          at::ArrayRef<at::ScalarType> dtypes) {
  std::vector<std::string> names;
  for (const at::ScalarType dtype : dtypes) names.push_back(dtype_name(dtype));
  const size_t index = std::find(dtypes.begin(), dtypes.end(), fallback) - dtypes.begin();
  return dtypes[object.choice(key, index, names)];
}

const std::vector<std::string> kShifts = {"none", "zero", "mean"};
const std::vector<std::string> kStreams = {"full_precision", "quantized"};
const std::vector<std::string> kLosses = {"mse", "relative"};
constexpr double kMaxLearningRate = 10.0;

// One list of fields a section, visited to read it and to write it: Reader and Writer have the same interface.

struct Reader {
  JsonObject object;
  void boolean(const char* key, bool& value) { value = object.boolean(key, value); }
  void integer(const char* key, int64_t& value, int64_t min) { value = object.integer(key, value, min, 1 << 24); }
  void number(const char* key, double& value, double min, double max) { value = object.number(key, value, min, max); }
  template <class Enum>
  void choice(const char* key, Enum& value, const std::vector<std::string>& names) {
    value = static_cast<Enum>(object.choice(key, static_cast<size_t>(value), names));
  }
  void dtype(const char* key, at::ScalarType& value, at::ArrayRef<at::ScalarType> dtypes = kDtypes) {
    value = read_dtype(object, key, value, dtypes);
  }
  /// A transform that is either absent or a Hadamard matrix.
  void hadamard(const char* key, bool& value) { value = object.choice(key, value, {"none", "hadamard"}) == 1; }
};

struct Writer {
  json object = json::object();
  void boolean(const char* key, const bool& value) { object[key] = value; }
  void integer(const char* key, const int64_t& value, int64_t) { object[key] = value; }
  void number(const char* key, const double& value, double, double) { object[key] = value; }
  template <class Enum>
  void choice(const char* key, const Enum& value, const std::vector<std::string>& names) {
    object[key] = names[static_cast<size_t>(value)];
  }
  void dtype(const char* key, const at::ScalarType& value, at::ArrayRef<at::ScalarType> = kDtypes) {
    object[key] = dtype_name(value);
  }
  void hadamard(const char* key, const bool& value) { object[key] = value ? "hadamard" : "none"; }
};

template <class Visitor, class R>
void visit_rounding(Visitor& visit, R& recipe) {
  visit.choice("method", recipe.rounding, kRoundings);
  visit.boolean("mse_clip", recipe.gptq.mse_clip);
  visit.number("mse_norm", recipe.gptq.search.norm, 1.0, 8.0);
  visit.integer("block_size", recipe.gptq.block_size, 1);
  visit.number("damping", recipe.gptq.damping, 0.0, 1.0);
  visit.boolean("activation_order", recipe.gptq.activation_order);
  visit.boolean("static_groups", recipe.gptq.static_groups);
  visit.boolean("compensate_streams", recipe.compensate_streams);
  visit.number("cross_strength", recipe.gptq.cross_strength, 0.0, 1.0);
  visit.boolean("quantized_inputs", recipe.quantized_inputs);
}

template <class Visitor, class L>
void visit_low_rank(Visitor& visit, L& low_rank) {
  visit.choice("method", low_rank.method, kLowRankMethods);
  visit.integer("rank", low_rank.rank, 1);
  visit.dtype("dtype", low_rank.dtype, kFactorDtypes);
  visit.choice("start", low_rank.fbquant.start, kFbquantStarts);
  visit.integer("steps", low_rank.fbquant.steps, 0);
  visit.number("learning_rate", low_rank.fbquant.learning_rate, 0, kMaxLearningRate);
  visit.integer("block_epochs", low_rank.block_epochs, 0);
  visit.number("block_learning_rate", low_rank.block_learning_rate, 0, kMaxLearningRate);
}

template <class Visitor, class A>
void visit_activations(Visitor& visit, A& activations) {
  visit.integer("num_bits", activations.spec.num_bits, 2);
  visit.boolean("symmetric", activations.spec.symmetric);
  visit.number("clip", activations.clip, 0.01, 1.0);
  visit.choice("shift", activations.shift, kShifts);
}

template <class Visitor, class A>
void visit_input_activations(Visitor& visit, A& activations) {
  visit_activations(visit, activations);
  visit.choice("norm_shift", activations.norm_shift, kShifts);
}

template <class Visitor, class T>
void visit_transforms(Visitor& visit, T& transforms) {
  visit.hadamard("residual", transforms.residual);
  visit.hadamard("input", transforms.input);
  visit.hadamard("value", transforms.value);
  visit.hadamard("query_key", transforms.query_key);
  visit.hadamard("o", transforms.o);
  visit.hadamard("down", transforms.down);
  visit.boolean("scale_norm", transforms.scale_norm);
  visit.boolean("scale_value", transforms.scale_value);
  visit.boolean("scale_query_key", transforms.scale_query_key);
  visit.boolean("scale_down", transforms.scale_down);
}

template <class Visitor, class L>
void visit_learn_transforms(Visitor& visit, L& learning) {
  visit.integer("epochs", learning.epochs, 0);
  visit.boolean("value_rotation", learning.value_rotation);
  visit.boolean("value_scale", learning.value_scale);
  visit.boolean("o_scale", learning.o_scale);
  visit.boolean("down_scale", learning.down_scale);
  visit.number("lr_rotation", learning.lr_rotation, 0, kMaxLearningRate);
  visit.number("lr_scale", learning.lr_scale, 0, kMaxLearningRate);
  visit.number("lr_clip", learning.lr_clip, 0, kMaxLearningRate);
  visit.number("lr_shift", learning.lr_shift, 0, kMaxLearningRate);
  visit.number("final_lr", learning.final_lr, 0, kMaxLearningRate);
}

template <class Visitor, class L>
void visit_learn_activations(Visitor& visit, L& learning) {
  visit.integer("epochs", learning.epochs, 0);
  visit.boolean("clip", learning.clip);
  visit.boolean("shift", learning.shift);
  visit.boolean("gain", learning.gain);
  visit.number("lr_clip", learning.lr_clip, 0, kMaxLearningRate);
  visit.number("lr_shift", learning.lr_shift, 0, kMaxLearningRate);
  visit.number("lr_gain", learning.lr_gain, 0, kMaxLearningRate);
  visit.number("final_lr", learning.final_lr, 0, kMaxLearningRate);
}

template <class Visitor, class R>
void visit_objective(Visitor& visit, R& recipe) {
  visit.choice("loss", recipe.loss, kLosses);
  visit.choice("stream", recipe.stream, kStreams);
  visit.dtype("products", recipe.products);
  visit.integer("batch_size", recipe.batch_size, 1);
  visit.integer("num_monitored", recipe.num_monitored, 1);
}

template <class Visitor, class R>
void visit_calibration(Visitor& visit, R& recipe) {
  visit.integer("num_samples", recipe.num_samples, 1);
  visit.integer("seq_len", recipe.seq_len, 2);
  visit.dtype("activations_dtype", recipe.activations_dtype, ActivationStorage::kDtypes);
}

/// Calls visit_section for an object that may be missing, and reports its unknown keys.
template <class Visit>
void read_section(JsonObject& parent, const char* key, Visit&& visit_section) {
  parent.ignore(key);
  if (!parent.contains(key)) return;
  Reader reader{parent.object(key)};
  visit_section(reader);
  reader.object.finish();
}

template <class Visit>
json write_section(Visit&& visit_section) {
  Writer writer;
  visit_section(writer);
  return writer.object;
}

}  // namespace

Recipe Recipe::from_json(const json& value, const std::string& path) {
  JsonObject object(value, path);
  Recipe recipe;
  recipe.name = object.text("name", "");
  object.ignore("weights");
  if (object.contains("weights")) recipe.weights = quant_spec_from_json(object.object("weights"), {});
  TORCH_CHECK(!recipe.weights || (!recipe.weights->dynamic && recipe.weights->strategy != Strategy::kToken), path,
              ": weights: expected strategy \"tensor\", \"channel\" or \"group\" and a static grid");
  read_section(object, "rounding", [&](auto& visit) { visit_rounding(visit, recipe); });
  read_section(object, "low_rank", [&](auto& visit) {
    // Not emplace(): clang does not see inside Recipe that it has a default constructor.
    recipe.low_rank = LowRank{};
    visit_low_rank(visit, *recipe.low_rank);
    TORCH_CHECK(recipe.weights, path, ": low_rank corrects rounded weights and there are none; add weights");
    TORCH_CHECK(recipe.low_rank->method != Recipe::LowRank::Method::kFbquant || recipe.rounding == Rounding::kNearest,
                path, ": low_rank: method \"fbquant\" rounds to nearest; set rounding.method to \"rtn\"");
    TORCH_CHECK(recipe.low_rank->method == Recipe::LowRank::Method::kFbquant || recipe.low_rank->block_epochs == 0,
                path, ": low_rank: block_epochs is for method \"fbquant\"");
  });
  read_section(object, "input_activations", [&](auto& visit) {
    recipe.input_activations = InputActivations{};
    recipe.input_activations->spec = {.symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
    visit_input_activations(visit, *recipe.input_activations);
    TORCH_CHECK(recipe.input_activations->spec.num_bits <= 8, path, ": input_activations: num_bits is more than 8");
  });
  read_section(object, "kv_cache", [&](auto& visit) {
    recipe.kv_cache.emplace();
    // The group is a head; its size is filled in when the model is known.
    recipe.kv_cache->spec = {.symmetric = false, .strategy = Strategy::kGroup, .dynamic = true};
    visit_activations(visit, *recipe.kv_cache);
    TORCH_CHECK(recipe.kv_cache->spec.num_bits <= 8, path, ": kv_cache: num_bits is more than 8");
  });
  read_section(object, "transforms", [&](auto& visit) { visit_transforms(visit, recipe.transforms); });
  TORCH_CHECK(!recipe.transforms.residual || !recipe.transforms.input, path,
              ": transforms: residual and input rotate the same channels; choose one");
  read_section(object, "learn_transforms",
               [&](auto& visit) { visit_learn_transforms(visit, recipe.learn_transforms); });
  if (const TransformLearning& learning = recipe.learn_transforms; learning.epochs > 0) {
    TORCH_CHECK(recipe.weights, path, ": learn_transforms: epochs need weights, which are rounded while it learns");
    TORCH_CHECK(recipe.input_activations || learning.value_rotation || learning.value_scale || learning.down_scale,
                path,
                ": learn_transforms: there is nothing to learn; o_scale and clips need input_activations, and "
                "value_rotation, value_scale and down_scale are false");
  }
  read_section(object, "learn_activations",
               [&](auto& visit) { visit_learn_activations(visit, recipe.learn_activations); });
  read_section(object, "objective", [&](auto& visit) { visit_objective(visit, recipe); });
  read_section(object, "calibration", [&](auto& visit) { visit_calibration(visit, recipe); });
  if (object.contains("dtype")) recipe.dtype = read_dtype(object, "dtype", at::kFloat, kDtypes);
  object.ignore("dtype");
  object.finish();
  return recipe;
}

json Recipe::to_json() const {
  json result{
      {"name", name},
      {"weights", weights ? baseq::to_json(*weights) : json(nullptr)},
      {"rounding", write_section([&](auto& visit) { visit_rounding(visit, *this); })},
      {"low_rank", nullptr},
      {"input_activations", nullptr},
      {"kv_cache", nullptr},
      {"transforms", write_section([&](auto& visit) { visit_transforms(visit, transforms); })},
      {"learn_transforms", write_section([&](auto& visit) { visit_learn_transforms(visit, learn_transforms); })},
      {"learn_activations", write_section([&](auto& visit) { visit_learn_activations(visit, learn_activations); })},
      {"objective", write_section([&](auto& visit) { visit_objective(visit, *this); })},
      {"calibration", write_section([&](auto& visit) { visit_calibration(visit, *this); })},
      {"dtype", nullptr}};
  if (low_rank) result["low_rank"] = write_section([&](auto& visit) { visit_low_rank(visit, *low_rank); });
  if (input_activations) {
    result["input_activations"] =
        write_section([&](auto& visit) { visit_input_activations(visit, *input_activations); });
  }
  if (kv_cache) result["kv_cache"] = write_section([&](auto& visit) { visit_activations(visit, *kv_cache); });
  if (dtype) result["dtype"] = dtype_name(*dtype);
  return result;
}

bool Recipe::has_mean_shift() const {
  return (input_activations &&
          (input_activations->shift == Shift::kMean || input_activations->norm_shift == Shift::kMean)) ||
         (kv_cache && kv_cache->shift == Shift::kMean);
}

bool Recipe::rounding_needs_moments() const {
  return weights && (rounding == Rounding::kGptq || (low_rank && low_rank->method != LowRank::Method::kSvd));
}

bool Recipe::learns() const {
  return learn_transforms.epochs > 0 || learn_activations.epochs > 0 || (low_rank && low_rank->block_epochs > 0);
}

bool Recipe::needs_calibration() const {
  const bool scales =
      transforms.scale_norm || transforms.scale_value || transforms.scale_query_key || transforms.scale_down;
  return rounding_needs_moments() || scales || has_mean_shift() || learns();
}

QuantizationConfig Recipe::quantization_config() const {
  QuantizationConfig config{.weights = weights, .lora_rank = low_rank ? low_rank->rank : 0};
  if (input_activations) config.input_activations = input_activations->spec;
  if (kv_cache) config.kv_cache = kv_cache->spec;
  return config;
}

void override_recipe(json& recipe, const std::string& path, const std::string& text) {
  json* value = &recipe;
  size_t begin = 0;
  for (;;) {
    const size_t dot = path.find('.', begin);
    const std::string key = path.substr(begin, dot - begin);
    TORCH_CHECK(!key.empty(), "recipe override: \"", path, "\" is not a dotted path of keys");
    TORCH_CHECK(value->is_object() || value->is_null(), "recipe override: \"", path, "\" passes through a value");
    value = &(*value)[key];
    if (dot == std::string::npos) break;
    begin = dot + 1;
  }
  const json parsed = json::parse(text, nullptr, /*allow_exceptions=*/false);
  *value = parsed.is_discarded() ? json(text) : parsed;
}

}  // namespace baseq

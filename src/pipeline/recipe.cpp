#include "baseq/pipeline/recipe.h"

#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <bit>
#include <concepts>
#include <type_traits>

#include "formats/native/config.h"
#include "pipeline/activations.h"
#include "recipe_rules.h"
#include "recipe_visitors.h"

namespace baseq {
namespace {

using StepKind = TransformStep::Kind;

using nlohmann::json;
using Names = std::vector<std::string>;

const Names kSteps = {"transform", "points", "learn", "round", "choose"};  // in the order of Step
const Names kTransforms = {"hadamard", "scale",     "matrix",      "balance",       "smooth",
                           "search",   "kronecker", "permutation", "coarse_to_fine"};
const Names kStarts = {"identity", "hadamard", "random", "greedy"};
const Names kCriteria = {"block_loss", "rounding_error", "rms", "difficulty"};
const Names kShifts = {"none", "zero", "mean"};
const Names kSpans = {"causal", "window"};
const Names kStreams = {"full_precision", "quantized"};
const Names kOver = {"blocks", "model"};
const Names kWindows = {"fixed", "slider"};
const Names kLosses = {"mse", "ce", "kl", "kl_top", "mse_kl"};
const Names kLearnedWeights = {"exact", "straight_through", "rounded"};
const Names kRules = {"adam", "sign", "cayley"};
const Names kSchedules = {"cosine", "linear", "constant"};
const Names kRoundings = {"rtn", "gptq"};
const Names kClips = {"none", "search", "hqq"};  // in the order of WeightRange
const Names kLowRankMethods = {"svd", "l2qer", "qera-approx", "qera-exact", "fbquant"};
const Names kFbquantStarts = {"qera", "zero", "svd"};
const Names kMatmulPrecisions = {"highest", "high", "medium"};
const Names kTokenWeights = {"uniform", "inverse_energy"};

constexpr int64_t kMaxShards = 1 << 16;
constexpr int64_t kMaxWindow = 64;  // blocks
constexpr at::ScalarType kFactorDtypes[] = {at::kFloat, at::kHalf, at::kBFloat16, at::kChar};

}  // namespace

// One list of fields per struct. Reader and writer find them by their arguments, so they have a namespace with a name.

/// All of a transform but its sites.
template <class Visitor, Is<TransformStep> S>
void visit_transform(Visitor& visit, S& step) {
  visit.choice("kind", step.kind, kTransforms);
  const bool matrix = step.kind == StepKind::kMatrix, kronecker = step.kind == StepKind::kKronecker;
  if (step.kind == StepKind::kSmooth) visit.number("strength", step.strength, 0, 1);
  if (matrix || kronecker) visit.choice("start", step.start, kStarts);
  if (matrix || step.kind == StepKind::kPermutation) visit.integer("block_size", step.block_size, 0);
  if (kronecker) visit.boolean("left_only", step.left_only);
}

template <class Visitor, Is<TransformStep> S>
void visit_fields(Visitor& visit, S& step) {
  visit.sites("at", step.at);
  visit_transform(visit, step);
}

template <class Visitor, Is<ChooseStep> S>
void visit_fields(Visitor& visit, S& step) {
  visit.sites("at", step.at);
  visit.chains("from", step.from);
  visit.choice("by", step.by, kCriteria);
  if (step.by == ChooseStep::By::kRms) visit.number("threshold", step.threshold, 0, 1e9);
}

template <class Visitor, Is<RuntimeSmooth> S>
void visit_fields(Visitor& visit, S& smooth) {
  visit.integer("group", smooth.group, 1);
  visit.choice("span", smooth.span, kSpans);
}

template <class Visitor, Is<PointsStep> S>
void visit_fields(Visitor& visit, S& step) {
  visit.points("at", step.at);
  visit.number("clip", step.clip, 0.01, 1);
  visit.choice("shift", step.shift, kShifts);
  visit.section("runtime", step.runtime);
  visit.choice("stream", step.stream, kStreams);
}

template <class Visitor, Is<LearnStep> S>
void visit_fields(Visitor& visit, S& step) {
  visit.text("name", step.name);
  visit.choice("loss", step.loss, kLosses);
  if (step.loss == LearnStep::Loss::kKlTop) visit.integer("top_k", step.top_k, 2);
  visit.choice("weights", step.weights, kLearnedWeights);
  // Neither this nor `rank` is among the defaults that are written out.
  const bool asked =
      std::is_const_v<S> ? step.rounded_share != 1 : step.weights == LearnStep::Weights::kStraightThrough;
  if (asked) visit.number("rounded_share", step.rounded_share, 0, 1);
  visit.integer("epochs", step.epochs, 0);
  visit.integer("steps", step.steps, 0);
  visit.choice("rule", step.rule, kRules);
  visit.rates("rates", step.rates);
  if (!std::is_const_v<S> || step.rank > 0) visit.integer("rank", step.rank, 1);
  visit.number("final_rate", step.final_rate, 0, kMaxLearningRate);
  visit.choice("schedule", step.schedule, kSchedules);
  visit.choice("stream", step.stream, kStreams);
  visit.dtype("products", step.products);
  visit.integer("batch_size", step.batch_size, 1);
  visit.integer("num_monitored", step.num_monitored, 1);
}

template <class Visitor, Is<LowRankOptions> S>
void visit_fields(Visitor& visit, S& low_rank) {
  visit.choice("method", low_rank.method, kLowRankMethods);
  visit.integer("rank", low_rank.rank, 1);
  visit.dtype("dtype", low_rank.dtype, kFactorDtypes);
  visit.choice("start", low_rank.start, kFbquantStarts);
  visit.integer("steps", low_rank.steps, 0);
  visit.number("learning_rate", low_rank.learning_rate, 0, kMaxLearningRate);
}

namespace {

enum class WeightRange { kNone, kSearch, kHalfQuadratic };

WeightRange range_of(const GptqOptions& options) {
  if (!options.mse_clip) return WeightRange::kNone;
  return options.search.method == MseSearch::Method::kRatios ? WeightRange::kSearch : WeightRange::kHalfQuadratic;
}

void set_range(GptqOptions& options, WeightRange range) {
  options.mse_clip = range != WeightRange::kNone;
  const bool half_quadratic = range == WeightRange::kHalfQuadratic;
  options.search.method = half_quadratic ? MseSearch::Method::kHalfQuadratic : MseSearch::Method::kRatios;
}

}  // namespace

template <class Visitor, Is<RoundStep> S>
void visit_fields(Visitor& visit, S& step) {
  visit.choice("method", step.method, kRoundings);
  WeightRange range = range_of(step.gptq);
  visit.choice("clip", range, kClips);
  if constexpr (!std::is_const_v<S>) set_range(step.gptq, range);
  visit.number("clip_norm", step.gptq.search.norm, 1, 8);
  visit.integer("block_size", step.gptq.block_size, 1);
  visit.number("damping", step.gptq.damping, 0, 1);
  visit.boolean("activation_order", step.gptq.activation_order);
  visit.boolean("static_groups", step.gptq.static_groups);
  visit.boolean("compensate_streams", step.compensate_streams);
  visit.number("cross_strength", step.gptq.cross_strength, 0, 1);
  visit.number("first_order", step.gptq.first_order, 0, 1);
  visit.boolean("quantized_inputs", step.quantized_inputs);
  visit.section("low_rank", step.low_rank);
}

/// A grid of activations or cache.
template <class Visitor, Is<QuantSpec> S>
void visit_fields(Visitor& visit, S& grid) {
  visit.integer("num_bits", grid.num_bits, 2, 8);
  visit.boolean("symmetric", grid.symmetric);
}

/// All but the static ones.
template <class Visitor, Is<Grids> S>
void visit_fields(Visitor& visit, S& grids) {
  visit.section("input_activations", grids.input_activations, Grids::kPerToken);
  visit.section("kv_cache", grids.kv_cache, Grids::kPerTokenAndHead);
}

namespace {

/// The static grids, which checkpoints have as well.
struct StaticGrid {
  const char* key;
  std::optional<QuantSpec> Grids::*grid;
};
constexpr StaticGrid kStaticGrids[] = {
    {"weights", &Grids::weights}, {"head", &Grids::head}, {"embedding", &Grids::embedding}};

template <class Visitor, Is<Recipe> S>
void visit_calibration(Visitor& visit, S& recipe) {
  visit.integer("num_samples", recipe.num_samples, 1);
  visit.integer("seq_len", recipe.seq_len, 2);
  visit.dtype("activations_dtype", recipe.activations_dtype, ActivationStorage::kDtypes);
  // Not among the defaults that are written out: most recipes say nothing of them.
  const bool reads = !std::is_const_v<S>;
  if (reads || recipe.shards != 1) visit.integer("shards", recipe.shards, 1, kMaxShards);
  if (reads || recipe.matmul_precision != MatmulPrecision::kHighest) {
    visit.choice("matmul_precision", recipe.matmul_precision, kMatmulPrecisions);
  }
}

/// The keys of the grid that differ from `weights`.
GridOverride read_override(JsonObject object, const std::optional<QuantSpec>& weights) {
  GridOverride result{.linears = object.texts("linears")};
  object.ignore("weights");
  if (object.contains("weights")) {
    result.weights = quant_spec_from_json(object.object("weights"), weights.value_or(QuantSpec{}));
  }
  object.finish();
  return result;
}

json write_override(const GridOverride& from) {
  return {{"linears", from.linears}, {"weights", from.weights ? to_json(*from.weights) : json(nullptr)}};
}

Grids read_grids(JsonObject object) {
  Grids grids;
  RecipeReader visit{std::move(object), grids};
  for (const auto& [key, grid] : kStaticGrids) {
    visit.object.ignore(key);
    if (visit.object.contains(key)) grids.*grid = quant_spec_from_json(visit.object.object(key), {});
  }
  for (JsonObject& item : visit.object.objects("overrides")) {
    grids.overrides.push_back(read_override(std::move(item), grids.weights));
  }
  visit_fields(visit, grids);
  visit.object.finish();
  return grids;
}

json write_grids(const Grids& grids) {
  RecipeWriter visit;
  visit_fields(visit, grids);
  for (const auto& [key, grid] : kStaticGrids)
    visit.object[key] = grids.*grid ? to_json(*(grids.*grid)) : json(nullptr);
  for (const GridOverride& item : grids.overrides) visit.object["overrides"].push_back(write_override(item));
  return visit.object;
}

template <size_t kIndex = 0>
Step make_step(size_t index) {
  if constexpr (kIndex + 1 < std::variant_size_v<Step>) {
    if (index > kIndex) return make_step<kIndex + 1>(index);
  }
  return std::variant_alternative_t<kIndex, Step>{};
}

Step read_step(JsonObject object, const Grids& grids) {
  TORCH_CHECK(object.contains("step"), object.path(), ".step: missing; expected one of \"", c10::Join("\", \"", kSteps),
              "\"");
  Step step = make_step(object.choice("step", 0, kSteps));
  RecipeReader visit{std::move(object), grids};
  std::visit([&](auto& typed) { visit_fields(visit, typed); }, step);
  visit.object.finish();
  return step;
}

json write_step(const Step& step) {
  RecipeWriter visit;
  visit.object["step"] = kSteps.at(step.index());
  std::visit([&](const auto& typed) { visit_fields(visit, typed); }, step);
  return visit.object;
}

/// What a list of passes says of one besides its steps.
Pass read_walk(JsonObject& object) {
  Pass pass{.over = static_cast<Pass::Over>(object.choice("over", 0, kOver))};
  if (pass.over == Pass::Over::kModel) return pass;
  pass.windows = static_cast<Pass::Windows>(object.choice("windows", 0, kWindows));
  if (pass.windows != Pass::Windows::kFixed) return pass;
  pass.window = object.integer("window", 1, 1, kMaxWindow);
  pass.stride = object.integer("stride", 1, 1, kMaxWindow);
  TORCH_CHECK(pass.stride <= pass.window, object.path(), ".stride: ", pass.stride,
              " leaves out blocks between windows of ", pass.window);
  return pass;
}

/// Adds the list "steps" of `object`; `paths` gets how errors name each of them.
Pass read_pass(JsonObject& object, const Grids& grids, std::vector<std::string>& paths, Pass pass = {}) {
  for (JsonObject& step : object.objects("steps")) {
    paths.push_back(step.path());
    pass.steps.push_back(read_step(std::move(step), grids));
  }
  return pass;
}

json write_pass(const Pass& pass) {
  json steps = json::array();
  for (const Step& step : pass.steps) steps.push_back(write_step(step));
  json object{{"steps", steps}};
  if (pass.over != Pass::Over::kBlocks) object["over"] = kOver.at(static_cast<size_t>(pass.over));
  if (pass.windows != Pass::Windows::kFixed) object["windows"] = kWindows.at(static_cast<size_t>(pass.windows));
  if (pass.windows == Pass::Windows::kFixed && pass.in_windows()) {
    object["window"] = pass.window;
    object["stride"] = pass.stride;
  }
  return object;
}

}  // namespace

std::string transform_name(TransformStep::Kind kind) { return kTransforms.at(static_cast<size_t>(kind)); }

Recipe Recipe::from_json(const json& value, const std::string& path) {
  JsonObject object(value, path);
  Recipe recipe;
  recipe.name = object.text("name", "");
  if (object.contains("dtype")) recipe.dtype = read_recipe_dtype(object, "dtype", at::kFloat, kRecipeDtypes);
  object.ignore("dtype");
  if (object.contains("grids")) recipe.grids = read_grids(object.object("grids"));
  object.ignore("grids");
  RecipeReader visit{std::move(object), recipe.grids};
  visit.choice("token_weights", recipe.token_weights, kTokenWeights);
  if (visit.object.contains("calibration")) {
    RecipeReader calibration{visit.object.object("calibration"), recipe.grids};
    visit_calibration(calibration, recipe);
    calibration.object.finish();
    TORCH_CHECK(std::has_single_bit(static_cast<uint64_t>(recipe.shards)), path, ".calibration.shards: got ",
                recipe.shards, ", expected a power of two");
  }
  visit.object.ignore("calibration");
  std::vector<std::vector<std::string>> step_paths(1);
  TORCH_CHECK(!visit.object.contains("steps") || !visit.object.contains("passes"), path,
              ": steps and passes exclude each other; several passes have their steps each");
  if (visit.object.contains("passes")) {
    recipe.passes.clear();
    step_paths.clear();
    for (JsonObject& pass : visit.object.objects("passes")) {
      recipe.passes.push_back(read_pass(pass, recipe.grids, step_paths.emplace_back(), read_walk(pass)));
      pass.finish();
    }
    TORCH_CHECK(!recipe.passes.empty(), path, ": passes: expected at least one");
  } else {
    recipe.passes = {read_pass(visit.object, recipe.grids, step_paths[0])};
  }
  visit.object.ignore("passes");
  visit.object.ignore("steps");
  visit.object.finish();
  check_grids(recipe.grids, path);
  check_steps(recipe, path, step_paths);
  return recipe;
}

json Recipe::to_json() const {
  RecipeWriter visit;
  visit.object = {{"name", name}, {"dtype", nullptr}, {"grids", write_grids(grids)}};
  if (dtype) visit.dtype("dtype", *dtype);
  visit.choice("token_weights", token_weights, kTokenWeights);
  RecipeWriter calibration;
  visit_calibration(calibration, *this);
  visit.object["calibration"] = calibration.object;
  if (passes.size() == 1 && passes[0].over == Pass::Over::kBlocks && !passes[0].in_windows()) {
    visit.object.update(write_pass(passes[0]));
  } else {
    visit.object["passes"] = json::array();
    for (const Pass& pass : passes) visit.object["passes"].push_back(write_pass(pass));
  }
  return visit.object;
}

void Recipe::validate() const {
  const std::string path = name.empty() ? "recipe" : "recipe \"" + name + "\"";
  check_grids(grids, path);
  from_json(to_json(), path);
}

}  // namespace baseq

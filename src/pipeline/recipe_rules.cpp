#include "recipe_rules.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>

#include "grid_overrides.h"
#include "transform_parameters.h"

namespace baseq {
namespace {

using StepKind = TransformStep::Kind;
using NameSet = std::set<std::string>;

/// What can be learned about the codes and the grid of a rounded weight.
constexpr std::array kOfCodes = {"weight_offset", "weight_value", "weight_scale", "weight_zero_point"};

std::string site_name(Site site) { return std::string(site_info(site).name); }

std::string quoted(const NameSet& names) { return fmt::format("\"{}\"", fmt::join(names, "\", \"")); }

bool allows(StepKind kind, Site site) {
  switch (kind) {
    case StepKind::kHadamard:
      return true;
    case StepKind::kSearch:  // where the weights take it
      return site == Site::kQkv || site == Site::kValue || site == Site::kGateUp || site == Site::kDown;
    case StepKind::kScale:
    case StepKind::kSmooth:
    case StepKind::kCoarseToFine:
      return site != Site::kResidual && site != Site::kQueryKey;
    case StepKind::kMatrix:
      return true;
    case StepKind::kKronecker:
    case StepKind::kPermutation:
      return site_info(site).is_input();
    case StepKind::kBalance:
      return site != Site::kResidual && site != Site::kO;
  }
  TORCH_INTERNAL_ASSERT(false, "unknown TransformStep::Kind");
}

/// Whether a parameter of that kind is a factor of a transform.
bool moves_transforms(const std::string& what) {
  return std::ranges::any_of(transform_leaves(), [&](const TransformLeaf& leaf) { return leaf.what == what; });
}

NameSet linear_names() {
  NameSet names;
  for (const SiteInfo& info : sites()) {
    if (info.is_input()) names.insert(info.readers.begin(), info.readers.end());
  }
  return names;
}

NameSet norm_sites() {
  NameSet names;
  for (const SiteInfo& info : sites()) {
    if (!info.norm.empty()) names.insert(std::string(info.name));
  }
  return names;
}

/// Follows the steps of a recipe and refuses what comes too early, too late, or to nothing.
class Order {
 public:
  explicit Order(const Recipe& recipe) : recipe_(recipe) {}

  void begin_pass(const Pass& pass) {
    rounded_in_pass_ = false;
    over_model_ = pass.over == Pass::Over::kModel;
    in_windows_ = pass.in_windows();
    learnable_["norm"] = norm_sites();
    if (over_model_) learnable_["norm"].insert("final");
  }
  void add(const Step& step, const std::string& path) {
    path_ = path;
    require(!over_model_ || std::holds_alternative<LearnStep>(step), "step",
            "a pass over the model has learn steps alone; put this one into a pass over blocks");
    const bool learns = std::holds_alternative<LearnStep>(step);
    require(
        !in_windows_ || learns || std::holds_alternative<RoundStep>(step), "step",
        "a pass in windows of blocks has learn steps and at its end maybe a round step; put this one into a pass over "
        "single blocks before it");
    require(
        !in_windows_ || !learns || !rounded_in_pass_, "step",
        "in a pass in windows a block is rounded when it leaves its last one; put this step before the round step or "
        "into a later pass");
    std::visit([this](const auto& typed) { add(typed); }, step);
    const auto* transform = std::get_if<TransformStep>(&step);
    turns_model_ = turns_model_ && transform && std::ranges::count(transform->at, Site::kResidual) > 0;
  }

  /// Every grid has its steps.
  void finish(const std::string& path) const {
    TORCH_CHECK(!recipe_.grids.weights || rounded_, path,
                ": grids.weights: no step rounds to it; add a round step or leave the grid out");
    for (const SiteInfo& info : sites()) {
      if (info.point.empty() || !grid_of(info) || points_.contains(info.site)) continue;
      TORCH_CHECK(false, path, ": grids.", grid_name(info), ": no points step turns on \"", point_name(info.site),
                  "\"; add one or leave the grid out");
    }
  }

 private:
  const std::optional<QuantSpec>& grid_of(const SiteInfo& info) const {
    return info.cache ? recipe_.grids.kv_cache : recipe_.grids.input_activations;
  }
  static const char* grid_name(const SiteInfo& info) { return info.cache ? "kv_cache" : "input_activations"; }

  template <class... Parts>
  void require(bool fulfilled, const char* key, const Parts&... parts) const {
    TORCH_CHECK(fulfilled, path_, ".", key, ": ", parts...);
  }

  void add(const TransformStep& step) {
    check_form(step);
    check_sites(step.at);
    require(step.kind != StepKind::kSearch || recipe_.grids.weights, "kind", "\"search\" needs grids.weights");
    for (const Site site : step.at) {
      require(allows(step.kind, site), "at", "no transform of that kind can stand at \"", site_name(site), "\"");
      require(step.block_size == 0 || site_info(site).is_input(), "block_size",
              "only inputs of linears have blocks, not \"", site_name(site), "\"");
      check_place_of(step, site);
    }
    for (const Site site : step.at) place(step, site);
    const auto rotated = [&](Site site) { return placed_.contains({StepKind::kHadamard, site}); };
    require(!rotated(Site::kResidual) || !(rotated(Site::kQkv) || rotated(Site::kGateUp)), "at",
            "\"residual\" rotates the inputs of \"qkv\" and \"gate_up\" already; leave one out");
  }

  void check_sites(const std::vector<Site>& at) const {
    require(!at.empty(), "at", "names no place");
    require(!rounded_, "at", "the weights are rounded by then, and a transform would change them");
    for (const Site site : at) {
      require(std::ranges::count(at, site) == 1, "at", "\"", site_name(site), "\" is there twice");
    }
  }

  /// What a transform says apart from its sites.
  void check_form(const TransformStep& step) const {
    const bool greedy = step.start == TransformStep::Start::kGreedy;
    require(!greedy || step.kind == StepKind::kMatrix, "start", "\"greedy\" is for matrices in blocks");
    require((!greedy && step.kind != StepKind::kPermutation) || step.block_size > 0, "block_size",
            "expected the number of features in a block");
  }

  void place(const TransformStep& step, Site site) {
    placed_.insert({step.kind, site});
    for (const char* what : learnable_by(step.kind, site)) learnable_[what].insert(site_name(site));
  }

  void add(const ChooseStep& step) {
    check_sites(step.at);
    require(!step.from.empty(), "from", "there is nothing to choose from");
    require(step.by != ChooseStep::By::kRms || step.from.size() == 2, "from",
            "\"rms\" chooses between two chains, got ", step.from.size());
    for (const Site site : step.at) {
      require(site_info(site).is_input() || step.by != ChooseStep::By::kRms, "at", "\"rms\" is of inputs of linears");
      require(site != Site::kResidual, "at", "\"residual\" is no place of one block");
      for (const std::vector<TransformStep>& chain : step.from) {
        for (const TransformStep& transform : chain) {
          check_form(transform);
          require(allows(transform.kind, site), "from", "no transform of that kind can stand at \"", site_name(site),
                  "\"");
          check_place_of(transform, site);
        }
      }
    }
    for (const Site site : step.at) place_choice(step.from, site);
  }

  /// A later step may learn what every chain has. What only some have, it cannot count on.
  void place_choice(const std::vector<std::vector<TransformStep>>& from, Site site) {
    std::map<std::string, size_t> chains_with;
    for (const std::vector<TransformStep>& chain : from) {
      NameSet learnable;
      for (const TransformStep& transform : chain) {
        placed_.insert({transform.kind, site});
        for (const char* what : learnable_by(transform.kind, site)) learnable.insert(what);
      }
      for (const std::string& what : learnable) ++chains_with[what];
    }
    for (const auto& [what, count] : chains_with) {
      if (count == from.size()) learnable_[what].insert(site_name(site));
    }
  }

  /// The parts of rates that name the factor that such a step places; none: it cannot be learned.
  static std::vector<const char*> learnable_by(StepKind kind, Site site) {
    if (kind == StepKind::kMatrix && site == Site::kResidual) return {"matrix"};
    const bool matrix = kind == StepKind::kMatrix || (kind == StepKind::kBalance && site == Site::kValue);
    if (matrix) return {"matrix", "svd", "band"};
    if (kind == StepKind::kKronecker) return {"kronecker"};
    // RoPE passes no other scales than those that are equal within each pair.
    const bool scale = kind == StepKind::kScale || kind == StepKind::kSmooth || kind == StepKind::kBalance ||
                       kind == StepKind::kCoarseToFine;
    if (scale && site != Site::kQueryKey) return {"scale"};
    return {};
  }

  void check_place_of(const TransformStep& step, Site site) const {
    const StepKind kind = step.kind;
    const std::string name = site_name(site);
    require(site != Site::kResidual || turns_model_, "at",
            "\"residual\" turns the whole model; only the first steps can do that");
    for (const Site point : {site, site == Site::kValue ? Site::kO : site}) {
      require(!points_.contains(point), "at", "\"", name, "\" changes what the point at \"", point_name(point),
              "\" sees; put this step before its points step");
    }
    const bool is_after = std::ranges::any_of(placed_, [&](const auto& placed) { return placed.second == site; });
    require(kind != StepKind::kBalance || site != Site::kQueryKey || !is_after, "at",
            "\"query_key\" has a transform already, and its balance is of the pairs that RoPE turns");
    const bool learned =
        kind == StepKind::kScale || kind == StepKind::kKronecker || (kind == StepKind::kMatrix && step.block_size == 0);
    require(!learned || !placed_.contains({kind, site}), "at", "\"", name, "\" has such a transform already");
  }

  void add(const PointsStep& step) {
    for (const Site site : step.at) {
      const SiteInfo& info = site_info(site);
      require(!info.point.empty(), "at", "\"", site_name(site), "\" has no quant point");
      require(grid_of(info).has_value(), "at", "\"", point_name(site), "\" needs grids.", grid_name(info));
      require(!step.runtime || !info.cache, "runtime", "\"", point_name(site),
              "\" is of the cache; only inputs of linears are smoothed at run time");
      require(fresh_.insert(site).second, "at", "\"", point_name(site), "\" is on already");
      points_.insert(site);
      learnable_["clip"].insert(point_name(site));
      learnable_["shift"].erase(point_name(site));
      if (step.shift != PointsStep::Shift::kNone) learnable_["shift"].insert(point_name(site));
      if (!info.cache) learnable_["gain"].insert(point_name(site));
    }
  }

  void add(const LearnStep& step) {
    using Weights = LearnStep::Weights;
    require(step.weights != Weights::kRounded || rounded_, "weights",
            "\"rounded\" needs a round step before this one; expected \"straight_through\" or \"exact\"");
    require(step.weights != Weights::kStraightThrough || !rounded_, "weights",
            "\"straight_through\" rounds weights that a step before this one has rounded; expected \"rounded\"");
    require(step.weights != Weights::kStraightThrough || recipe_.grids.weights, "weights",
            "\"straight_through\" needs grids.weights");
    const bool of_outputs = step.loss == LearnStep::Loss::kMse || step.loss == LearnStep::Loss::kMseKl;
    require(of_outputs != over_model_, "loss",
            over_model_
                ? "\"mse\" and \"mse_kl\" are losses of blocks; expected \"ce\", \"kl\" or \"kl_top\" in a pass "
                  "over the model"
                : "only a pass over the model has a loss at the head; expected \"mse\" or \"mse_kl\"");
    require(!over_model_ || step.stream == Stream::kFullPrecision, "stream",
            "a pass over the model begins at the embedding; leave it out");
    require(!step.rates.empty(), "rates", "there is nothing to learn");
    fresh_.clear();
    for (const auto& [name, rate] : step.rates) {
      check_rate(name, step.weights);
      clips_weights_ = clips_weights_ || name.ends_with(".weight_clip");
    }
    const auto learns = [&](const auto& whats) {
      return std::ranges::any_of(step.rates, [&](const auto& rate) {
        return std::ranges::any_of(whats,
                                   [&](const char* what) { return rate.first.ends_with(std::string(".") + what); });
      });
    };
    const bool has_rank = step.rank > 0, lora = learns(std::array{"weight_lora"});
    require(!lora || has_rank, "rank", "missing; \"weight_lora\" is a product of that rank");
    require(!has_rank || lora || learns(std::array{"weight_offset"}), "rank",
            "is of \"weight_lora\" and \"weight_offset\", and no rate names them");
    require(!learns(kOfCodes) || !learns(std::array{"low_rank"}), "rates",
            "\"low_rank\" rounds the weights anew, and what is learned about their codes would be lost");
  }

  void check_rate(const std::string& rate, LearnStep::Weights weights) const {
    using Weights = LearnStep::Weights;
    const size_t dot = rate.rfind('.');
    const std::string place = rate.substr(0, dot), what = dot == std::string::npos ? "" : rate.substr(dot + 1);
    const auto found = learnable_.find(what);
    if (found == learnable_.end()) {
      NameSet known;
      for (const auto& [name, places] : learnable_) known.insert(name);
      require(false, "rates", "unknown \"", rate, "\"; expected \"PLACE.WHAT\" or \"*.WHAT\", where WHAT is one of ",
              quoted(known));
    }
    require((what != "weight_clip" && what != "weight_lora") || weights == Weights::kStraightThrough, "rates", "\"",
            rate, "\" needs weights \"straight_through\"");
    const bool of_codes = std::ranges::find(kOfCodes, what) != kOfCodes.end();
    require((what != "low_rank" && !of_codes) || weights == Weights::kRounded, "rates", "\"", rate,
            "\" needs weights \"rounded\"");
    require(!moves_transforms(what) || !rounded_, "rates", "\"", rate,
            "\" would change weights that are rounded by then");
    const bool turns_model = what == "matrix" && (place == "residual" || (place == "*" && over_model_)) &&
                             found->second.contains("residual");
    require(!turns_model || (over_model_ && weights == Weights::kExact), "rates", "\"", rate,
            "\": \"residual\" turns the whole model; only a pass over the model with weights \"exact\" learns that");
    NameSet places = found->second;
    if (!over_model_) places.erase("residual");
    require(place == "*" ? !places.empty() : places.contains(place), "rates", "\"", rate, "\": there is no such ", what,
            " by then", places.empty() ? "" : ", only at " + quoted(places));
  }

  void add(const RoundStep& step) {
    using Method = RoundStep::Method;
    require(recipe_.grids.weights.has_value(), "step", "\"round\" needs grids.weights");
    require(!rounded_in_pass_, "step", "\"round\" comes twice in a pass");
    const bool fbquant = step.low_rank && step.low_rank->method == LowRankOptions::Method::kFbquant;
    require(!fbquant || step.method == Method::kNearest, "method",
            "low_rank.method \"fbquant\" rounds to nearest; expected \"rtn\"");
    require(!clips_weights_ || (step.method == Method::kNearest && !fbquant), "method",
            "a step before this one learns weight_clip, which only \"rtn\" without \"fbquant\" uses");
    const bool groups = recipe_.grids.weights->strategy == Strategy::kGroup && step.method == Method::kGptq;
    require(!groups || step.gptq.static_groups || !step.gptq.activation_order, "static_groups",
            "false needs activation_order false");
    rounded_ = rounded_in_pass_ = true;
    learnable_["weight_clip"].clear();
    learnable_["weight_lora"].clear();
    for (const char* what : kOfCodes) learnable_[what] = linear_names();
    if (recipe_.grids.weights->symmetric) learnable_["weight_zero_point"].clear();
    learnable_["low_rank"] = fbquant ? linear_names() : NameSet{};
  }

  const Recipe& recipe_;
  std::string path_;  ///< of the step at hand
  bool over_model_ = false, in_windows_ = false, turns_model_ = true, rounded_ = false, rounded_in_pass_ = false,
       clips_weights_ = false;
  std::set<std::pair<StepKind, Site>> placed_;
  std::set<Site> points_;
  std::set<Site> fresh_;  ///< points that no learn step has seen since they were turned on
  /// Where there is what a learn step can learn, as recipes name it.
  std::map<std::string, NameSet> learnable_{{"scale", {}},
                                            {"matrix", {}},
                                            {"svd", {}},
                                            {"band", {}},
                                            {"kronecker", {}},
                                            {"clip", {}},
                                            {"shift", {}},
                                            {"gain", {}},
                                            {"norm", norm_sites()},
                                            {"low_rank", {}},
                                            {"weight_offset", {}},
                                            {"weight_value", {}},
                                            {"weight_scale", {}},
                                            {"weight_zero_point", {}},
                                            {"weight_clip", linear_names()},
                                            {"weight_lora", linear_names()}};
};

}  // namespace

void check_grids(const Grids& grids, const std::string& path) {
  const auto check_weights = [&](const std::string& key, const std::optional<QuantSpec>& grid) {
    TORCH_CHECK(!grid || (!grid->dynamic && grid->strategy != Strategy::kToken), path, ": ", key,
                ": expected strategy \"tensor\", \"channel\" or \"group\" and a static grid");
  };
  check_weights("grids.weights", grids.weights);
  TORCH_CHECK(grids.weights || grids.overrides.empty(), path,
              ": grids.overrides: replace grids.weights for some linears, but there are none");
  for (size_t i = 0; i < grids.overrides.size(); ++i) {
    const std::string key = "grids.overrides[" + std::to_string(i) + "]";
    check_weights(key + ".weights", grids.overrides[i].weights);
    TORCH_CHECK(!grids.overrides[i].linears.empty(), path, ": ", key, ".linears: names no linear");
    for (const std::string& pattern : grids.overrides[i].linears) {
      check_pattern(pattern, path + ": " + key + ".linears");
    }
  }
  const std::pair<const char*, const std::optional<QuantSpec>*> tables[] = {{"head", &grids.head},
                                                                            {"embedding", &grids.embedding}};
  for (const auto& [key, grid] : tables) {
    const bool by_rows = !*grid || (*grid)->strategy == Strategy::kChannel || (*grid)->strategy == Strategy::kGroup;
    TORCH_CHECK(by_rows && !(*grid && (*grid)->dynamic), path, ": grids.", key,
                ": expected strategy \"channel\" or \"group\" and a static grid");
  }
  const auto check = [&](const char* key, const std::optional<QuantSpec>& grid, QuantSpec like, const char* expected) {
    if (!grid) return;
    like.num_bits = grid->num_bits;
    like.symmetric = grid->symmetric;
    like.group_size = grid->group_size;
    TORCH_CHECK(*grid == like, path, ": grids.", key, ": expected a dynamic grid with one float32 scale per ",
                expected);
  };
  check("input_activations", grids.input_activations, Grids::kPerToken, "token, as Grids::kPerToken");
  check("kv_cache", grids.kv_cache, Grids::kPerTokenAndHead, "token and head, as Grids::kPerTokenAndHead");
}

void check_steps(const Recipe& recipe, const std::string& path,
                 const std::vector<std::vector<std::string>>& step_paths) {
  Order order(recipe);
  for (size_t pass = 0; pass < recipe.passes.size(); ++pass) {
    order.begin_pass(recipe.passes[pass]);
    const std::vector<Step>& steps = recipe.passes[pass].steps;
    for (size_t i = 0; i < steps.size(); ++i) order.add(steps[i], step_paths[pass][i]);
  }
  order.finish(path);
}

}  // namespace baseq

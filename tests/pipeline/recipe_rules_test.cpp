#include <gtest/gtest.h>

#include <algorithm>

#include "recipe_texts.h"

namespace baseq {
namespace {

using test::expect_refused;
using test::kPoints;
using test::kRound;
using test::learn;
using test::recipe_of;
using test::with_grids;
using test::with_weights;

/// The steps that a recipe with every grid needs after its transforms.
const std::string kRest = ", " + kPoints + ", " + kRound;

TEST(RecipeRules, TransformsStandWhereTheyCan) {
  const auto refused = [](const std::string& steps, const std::vector<std::string>& parts) {
    expect_refused(with_grids(steps + kRest), parts);
  };
  const auto transform = [](const std::string& kind, const std::string& at) {
    return R"({"step": "transform", "kind": ")" + kind + R"(", "at": [)" + at + "]}";
  };
  struct Allowed {
    const char* kind;
    std::vector<const char*> sites;
  };
  const std::vector<Allowed> table = {{"hadamard", {"residual", "qkv", "query_key", "value", "o", "gate_up", "down"}},
                                      {"scale", {"qkv", "value", "o", "gate_up", "down"}},
                                      {"smooth", {"qkv", "value", "o", "gate_up", "down"}},
                                      {"search", {"qkv", "value", "gate_up", "down"}},
                                      {"matrix", {"residual", "qkv", "query_key", "value", "o", "gate_up", "down"}},
                                      {"kronecker", {"qkv", "o", "gate_up", "down"}},
                                      {"balance", {"qkv", "query_key", "value", "gate_up", "down"}}};
  for (const auto& [kind, sites] : table) {
    for (const SiteInfo& info : baseq::sites()) {
      const std::string name(info.name), steps = transform(kind, "\"" + name + "\"");
      if (std::find(sites.begin(), sites.end(), name) != sites.end()) {
        EXPECT_NO_THROW(recipe_of(with_grids(steps + kRest))) << steps;
      } else {
        refused(steps, {"recipe.json: steps[0].at", "\"" + name + "\""});
      }
    }
  }
  refused(transform("hadamard", ""), {"steps[0].at: names no place"});
  refused(transform("hadamard", R"("down", "down")"), {"steps[0].at", "\"down\" is there twice"});
  refused(transform("scale", R"("down")") + ", " + transform("hadamard", R"("residual")"),
          {"steps[1].at", "only the first step"});
  expect_refused(R"({"passes": [{}, {"steps": [)" + transform("scale", R"("o")") + ", " +
                     transform("hadamard", R"("residual")") + "]}]}",
                 {"passes[1].steps[1].at", "only the first step"});
  refused(transform("hadamard", R"("residual", "qkv")"), {"steps[0].at", "\"residual\"", "leave one out"});
  refused(transform("hadamard", R"("residual")") + ", " + transform("hadamard", R"("gate_up")"),
          {"steps[1].at", "leave one out"});
  refused(transform("scale", R"("down")") + ", " + transform("scale", R"("down")"), {"steps[1].at", "\"down\""});
  refused(transform("matrix", R"("value")") + ", " + transform("matrix", R"("value")"), {"steps[1].at", "\"value\""});
  refused(transform("kronecker", R"("o")") + ", " + transform("kronecker", R"("o")"), {"steps[1].at", "\"o\""});
  refused(transform("hadamard", R"("query_key")") + ", " + transform("balance", R"("query_key")"),
          {"steps[1].at", "RoPE"});
  EXPECT_NO_THROW(recipe_of(with_grids(transform("balance", R"("value", "down", "query_key")") + ", " +
                                       transform("matrix", R"("value")") + ", " + transform("scale", R"("down")") +
                                       ", " + transform("hadamard", R"("value", "down", "query_key")") + ", " +
                                       transform("smooth", R"("down")") + kRest)));
}

TEST(RecipeRules, PointsStartAgainAfterTheyWereLearned) {
  const std::string tune = learn(R"("*.clip": 1)", "straight_through"), plain = R"({"step": "points", "at": ["*"]})";
  EXPECT_NO_THROW(recipe_of(with_grids(kPoints + ", " + tune + ", " + plain + ", " + kRound)));
  expect_refused(with_grids(kPoints + ", " + tune + ", " + plain + ", " + plain + ", " + kRound),
                 {"steps[3].at", "is on already"});
  // What was on before is gone.
  expect_refused(with_grids(kPoints + ", " + tune + ", " + plain + ", " + kRound + ", " + learn(R"("*.shift": 1)")),
                 {"steps[4].rates", "no such shift"});
}

TEST(RecipeRules, OnlyInputsAreSmoothedAtRunTime) {
  const auto points = [](const std::string& at) {
    return R"({"step": "points", "at": [)" + at + R"(], "runtime": {"group": 8, "span": "window"}})";
  };
  EXPECT_NO_THROW(recipe_of(R"({"grids": {"input_activations": {}}, "steps": [)" +
                            points(R"("qkv", "o", "gate_up", "down")") + "]}"));
  expect_refused(with_grids(points(R"("v_cache")")), {"steps[0].runtime", "\"v_cache\""});
}

TEST(RecipeRules, BlocksAreOfInputs) {
  const auto transform = [](const std::string& fields) { return R"({"step": "transform", )" + fields + "}"; };
  const auto refused = [&](const std::string& fields, const std::vector<std::string>& parts) {
    expect_refused(with_grids(transform(fields) + kRest), parts);
  };
  const std::string rotation = R"("kind": "matrix", "start": "greedy", "block_size": 8, "at": ["down", "qkv"])",
                    zigzag = R"("kind": "permutation", "block_size": 8, "at": ["down", "qkv"])";
  EXPECT_NO_THROW(
      recipe_of(with_grids(transform(rotation) + ", " + transform(zigzag) + ", " + transform(rotation) + kRest)));
  refused(R"("kind": "permutation", "at": ["down"])", {"steps[0].block_size: expected"});
  refused(R"("kind": "matrix", "start": "greedy", "at": ["down"])", {"steps[0].block_size: expected"});
  refused(R"("kind": "matrix", "block_size": 8, "at": ["value"])", {"steps[0].block_size", "\"value\""});
  refused(R"("kind": "kronecker", "start": "greedy", "at": ["down"])", {"steps[0].start", "greedy"});
  refused(R"("kind": "matrix", "left_only": true, "at": ["value"])", {"left_only"});
  refused(R"("kind": "hadamard", "start": "random", "at": ["value"])", {"start"});
}

TEST(RecipeRules, ChoicesAreBetweenWhatCanStandThere) {
  const auto choose = [](const std::string& fields) { return R"({"step": "choose", )" + fields + "}"; };
  const auto refused = [&](const std::string& fields, const std::vector<std::string>& parts) {
    expect_refused(with_grids(choose(fields) + kRest), parts);
  };
  const std::string none = R"({"transforms": []})", hadamard = R"({"transforms": [{"kind": "hadamard"}]})",
                    smooth = R"({"transforms": [{"kind": "smooth"}, {"kind": "hadamard"}]})";
  const std::string three = R"("at": ["qkv", "down"], "from": [)" + none + ", " + hadamard + ", " + smooth + "]";
  for (const char* by : {"block_loss", "rounding_error", "difficulty"}) {
    EXPECT_NO_THROW(recipe_of(with_grids(choose(three + R"(, "by": ")" + by + "\"") + kRest)));
  }
  refused(three + R"(, "by": "rms")", {"steps[0].from", "two chains"});
  refused(three + R"(, "by": "luck")", {"steps[0].by", "luck"});
  refused(R"("at": ["qkv"], "from": [])", {"steps[0].from", "nothing to choose"});
  refused(R"("at": [], "from": [)" + none + "]", {"steps[0].at", "no place"});
  refused(R"("at": ["residual"], "from": [)" + hadamard + "]", {"steps[0].at", "residual"});
  refused(R"("at": ["query_key"], "from": [)" + smooth + "]", {"steps[0].from", "query_key"});
  refused(R"("at": ["qkv"], "from": [{"transforms": [{"kind": "hadamard", "at": ["o"]}]}])", {"from[0]", "at"});
  expect_refused(with_weights(kRound + ", " + choose(three)), {"steps[1].at", "rounded by then"});
  // What every chain has can be learned.
  const std::string scales = R"("at": ["down"], "from": [{"transforms": [{"kind": "scale"}]}, )" + smooth + "]";
  EXPECT_NO_THROW(
      recipe_of(with_grids(choose(scales) + ", " + learn(R"("down.scale": 1)", "straight_through") + kRest)));
  expect_refused(with_grids(choose(three) + ", " + learn(R"("down.scale": 1)", "straight_through") + kRest),
                 {"steps[1].rates", "no such scale"});
}

TEST(RecipeRules, TransformsComeBeforeWhatTheyWouldChange) {
  const std::string transform = R"({"step": "transform", "at": ["value"]})";
  expect_refused(with_weights(kRound + ", " + transform), {"steps[1].at", "rounded by then"});
  expect_refused(R"({"grids": {"weights": {}}, "passes": [{"steps": [{"step": "round"}]}, {"steps": [)" + transform +
                     R"(, {"step": "round"}]}]})",
                 {"recipe.json: passes[1].steps[0].at", "rounded by then"});
  expect_refused(with_grids(kPoints + ", " + transform + ", " + kRound), {"steps[1].at", "\"value\"", "\"v_cache\""});
  expect_refused(R"({"grids": {"input_activations": {}}, "steps": [)" + kPoints + ", " + transform + "]}",
                 {"steps[1].at", "\"value\"", "\"o\""});
}

TEST(RecipeRules, EveryGridHasItsStepsAndEveryStepItsGrid) {
  expect_refused(R"({"grids": {"weights": {}}})", {"recipe.json: grids.weights: no step rounds to it"});
  expect_refused(R"({"grids": {"input_activations": {}}})", {"recipe.json: grids.input_activations", "\"qkv\""});
  expect_refused(R"({"grids": {"kv_cache": {}}, "steps": [{"step": "points", "at": ["k_cache"]}]})",
                 {"recipe.json: grids.kv_cache", "\"v_cache\""});
  expect_refused(R"({"steps": [{"step": "round"}]})", {"steps[0].step", "needs grids.weights"});
  expect_refused(R"({"steps": [{"step": "points", "at": ["down"]}]})", {"steps[0].at", "grids.input_activations"});
  expect_refused(R"({"steps": [{"step": "points", "at": ["k_cache"]}]})", {"steps[0].at", "grids.kv_cache"});
  expect_refused(with_grids(kPoints + R"(, {"step": "points", "at": ["o"]}, )" + kRound),
                 {"steps[1].at", "\"o\" is on already"});
  expect_refused(with_grids(R"({"step": "points", "at": ["o", "*"]}, )" + kRound),
                 {"steps[0].at", "\"o\" is on already"});
  expect_refused(with_weights(kRound + ", " + kRound), {"steps[1].step", "twice"});
  EXPECT_NO_THROW(recipe_of(R"({"grids": {"weights": {}}, "passes": [{"steps": [{"step": "round"}]},
                                                                     {"steps": [{"step": "round"}]}]})"));
}

TEST(RecipeRules, RoundingKnowsWhatGoesTogether) {
  expect_refused(with_weights(R"({"step": "round", "method": "gptq", "low_rank": {"method": "fbquant"}})"),
                 {"steps[0].method", "fbquant", "rtn"});
  const std::string no_static_groups = R"({"step": "round", "method": "gptq", "static_groups": false)";
  const std::string grouped = R"({"grids": {"weights": {"strategy": "group", "group_size": 16}}, "steps": [)";
  expect_refused(grouped + no_static_groups + "}]}", {"steps[0].static_groups", "activation_order"});
  EXPECT_NO_THROW(recipe_of(grouped + no_static_groups + R"(, "activation_order": false}]})"));
  EXPECT_NO_THROW(recipe_of(with_weights(no_static_groups + "}")));
  const std::string clips = R"({"step": "learn", "weights": "straight_through", "rates": {"*.weight_clip": 1}}, )";
  EXPECT_NO_THROW(recipe_of(with_weights(clips + kRound)));
  expect_refused(with_weights(clips + R"({"step": "round", "method": "gptq"})"), {"steps[1].method", "weight_clip"});
  expect_refused(with_weights(clips + R"({"step": "round", "low_rank": {"method": "fbquant"}})"),
                 {"steps[1].method", "weight_clip"});
}

TEST(RecipeRules, WeightsAreLearnedWithInTheStateThatTheyHave) {
  const std::string clips = R"("*.clip": 1)";
  expect_refused(with_grids(kPoints + ", " + learn(clips) + ", " + kRound), {"steps[1].weights", "round step"});
  expect_refused(with_grids(kPoints + ", " + kRound + ", " + learn(clips, "straight_through")),
                 {"steps[2].weights", "\"rounded\""});
  expect_refused(
      R"({"grids": {"input_activations": {}}, "steps": [)" + kPoints + ", " + learn(clips, "straight_through") + "]}",
      {"steps[1].weights", "grids.weights"});
  expect_refused(R"({"steps": [)" + learn("", "exact") + "]}",
                 {"recipe.json: steps[0].rates: there is nothing to learn"});
  EXPECT_NO_THROW(recipe_of(with_grids(kPoints + ", " + learn(clips, "exact") + ", " + kRound)));
  EXPECT_NO_THROW(recipe_of(with_grids(kPoints + ", " + kRound + ", " + learn(clips, "exact"))));
  EXPECT_NO_THROW(recipe_of(with_grids(kPoints + ", " + kRound + ", " + learn(clips))));
}

TEST(RecipeRules, RatesNameWhatIsThereByThen) {
  // Refused before the round step with straight-through weights, after `steps`.
  const auto refused = [](const std::string& steps, const std::string& rate, const std::vector<std::string>& parts) {
    const std::string rates = "\"" + rate + "\": 1";
    expect_refused(with_grids(steps + learn(rates, "straight_through") + kRest), parts);
  };
  const auto accepted = [](const std::string& steps, const std::string& rate) {
    const std::string rates = "\"" + rate + "\": 1";
    EXPECT_NO_THROW(recipe_of(with_grids(steps + learn(rates, "straight_through") + kRest))) << steps << rate;
  };
  for (const char* rate : {"scale", "value.rotation", "*", "clip.*", ""}) {
    refused("", rate, {"recipe.json: steps[0].rates: unknown \"" + std::string(rate) + "\"", "\"weight_clip\""});
  }
  for (const char* what : {"scale", "matrix", "svd", "band", "kronecker", "clip", "shift", "gain"}) {
    refused("", std::string("*.") + what, {"steps[0].rates: \"*." + std::string(what) + "\": there is no such"});
  }
  const std::string scale = R"({"step": "transform", "kind": "scale", "at": ["down"]}, )";
  accepted(scale, "*.scale");
  accepted(scale, "down.scale");
  refused(scale, "o.scale", {"steps[1].rates: \"o.scale\": there is no such scale by then, only at \"down\""});
  refused(scale, "*.matrix", {"steps[1].rates", "no such matrix"});
  accepted(R"({"step": "transform", "kind": "smooth", "at": ["down"]}, )", "down.scale");
  accepted(R"({"step": "transform", "kind": "matrix", "at": ["value"]}, )", "value.matrix");
  const std::string balance = R"({"step": "transform", "kind": "balance", "at": ["value", "query_key", "down"]}, )";
  accepted(balance, "value.matrix");
  accepted(balance, "*.svd");
  accepted(R"({"step": "transform", "kind": "matrix", "at": ["query_key"]}, )", "query_key.svd");
  accepted(R"({"step": "transform", "kind": "kronecker", "at": ["o"]}, )", "o.kronecker");
  refused(balance, "query_key.scale", {"steps[1].rates", "only at \"down\""});
  accepted("", "*.weight_clip");
  accepted("", "mlp.down_proj.weight_clip");
  refused("", "down.weight_clip", {"steps[0].rates", "\"mlp.down_proj\""});
  refused("", "*.low_rank", {"steps[0].rates", "needs weights \"rounded\""});
  expect_refused(with_weights(learn(R"("*.weight_clip": 1)", "exact") + ", " + kRound),
                 {"steps[0].rates", "needs weights \"straight_through\""});
}

TEST(RecipeRules, CodesAreLearnedOnceThereAreSome) {
  const std::string then = kRound + ", ";
  for (const std::string what : {"weight_offset", "weight_value", "weight_scale", "weight_zero_point"}) {
    const std::string rates = "\"*." + what + "\": 1", one = "\"mlp.up_proj." + what + "\": 1";
    expect_refused(with_weights(learn(rates, "straight_through") + ", " + kRound),
                   {"steps[0].rates", "needs weights \"rounded\""});
    expect_refused(with_weights(then + learn(rates, "exact")), {"steps[1].rates", "needs weights \"rounded\""});
    const std::string asymmetric = R"({"grids": {"weights": {"symmetric": false}}, "steps": [)" + then;
    EXPECT_NO_THROW(recipe_of(asymmetric + learn(rates) + "]}")) << what;
    EXPECT_NO_THROW(recipe_of(asymmetric + learn(one) + "]}")) << what;
    const std::string symmetric = with_weights(then + learn(rates));
    if (what == "weight_zero_point") {
      expect_refused(symmetric, {"steps[1].rates", "there is no such weight_zero_point"});
    } else {
      EXPECT_NO_THROW(recipe_of(symmetric)) << what;
    }
  }
  const std::string corrected = R"({"step": "round", "low_rank": {"method": "fbquant"}}, )";
  EXPECT_NO_THROW(recipe_of(with_weights(corrected + learn(R"("*.weight_offset": 1)"))));
  expect_refused(with_weights(corrected + learn(R"("*.weight_offset": 1, "*.low_rank": 1)")),
                 {"steps[1].rates", "\"low_rank\""});
}

TEST(RecipeRules, ASearchedScaleNeedsAWeightGrid) {
  expect_refused(R"({"grids": {"input_activations": {}}, "steps": [
                     {"step": "transform", "kind": "search", "at": ["qkv"]}, {"step": "points", "at": ["*"]}]})",
                 {"steps[0].kind", "grids.weights"});
}

TEST(RecipeRules, PointsAreLearnedWhereTheyAreOn) {
  const auto after = [](const std::string& points, const std::string& rate) {
    return with_grids(points + ", " + kRound + ", " + learn("\"" + rate + "\": 1"));
  };
  const std::string no_shift = R"({"step": "points", "at": ["*"]})";
  for (const char* rate : {"*.clip", "k_cache.clip", "v_cache.shift", "o.shift", "*.gain", "qkv.gain"}) {
    EXPECT_NO_THROW(recipe_of(after(kPoints, rate))) << rate;
  }
  expect_refused(after(no_shift, "*.shift"), {"steps[2].rates: \"*.shift\": there is no such shift by then"});
  expect_refused(after(kPoints, "v_cache.gain"), {"steps[2].rates", "only at \"down\", \"gate_up\""});
  expect_refused(after(kPoints, "value.clip"), {"steps[2].rates", "\"v_cache\""});
  const std::string two = R"({"step": "points", "at": ["o"]}, )" + learn(R"("qkv.clip": 1)", "straight_through");
  expect_refused(
      with_grids(two + R"(, {"step": "points", "at": ["qkv", "gate_up", "down", "k_cache", "v_cache"]}, )" + kRound),
      {"steps[1].rates", "only at \"o\""});
}

TEST(RecipeRules, OfRoundedWeightsOnlyTheirCorrectionIsLearned) {
  const std::string scale = R"({"step": "transform", "kind": "scale", "at": ["down"]}, )";
  expect_refused(with_weights(scale + kRound + ", " + learn(R"("*.scale": 1)")),
                 {"steps[2].rates", "\"*.scale\" would change weights that are rounded by then"});
  const auto low_rank = [](const char* method, const char* rate) {
    return with_weights(R"({"step": "round", "low_rank": {"method": ")" + std::string(method) + "\"}}, " +
                        learn("\"" + std::string(rate) + "\": 1"));
  };
  EXPECT_NO_THROW(recipe_of(low_rank("fbquant", "*.low_rank")));
  EXPECT_NO_THROW(recipe_of(low_rank("fbquant", "mlp.up_proj.low_rank")));
  expect_refused(low_rank("qera-exact", "*.low_rank"), {"steps[1].rates", "no such low_rank"});
  expect_refused(low_rank("fbquant", "up_proj.low_rank"), {"steps[1].rates", "\"mlp.up_proj\""});
}

TEST(RecipeRules, APassOverTheModelLearnsByALossAtTheHead) {
  const auto over_model = [](const std::string& steps) {
    return R"({"grids": {"weights": {}}, "passes": [{"steps": [)" + kRound + R"(]}, {"over": "model", "steps": [)" +
           steps + "]}]}";
  };
  const auto tuned = [](const std::string& loss, const std::string& rates) {
    return R"({"step": "learn", "loss": ")" + loss + R"(", "rates": {)" + rates + "}}";
  };
  const std::string rates = R"("*.norm": 1, "*.weight_scale": 1, "mlp.up_proj.weight_scale": 1)";
  for (const char* loss : {"ce", "kl", "kl_top"}) {
    const Recipe recipe = recipe_of(over_model(tuned(loss, rates)));
    EXPECT_EQ(recipe.passes[1].over, Pass::Over::kModel);
    EXPECT_EQ(Recipe::from_json(recipe.to_json(), "again").to_json(), recipe.to_json());
  }
  expect_refused(over_model(tuned("mse", rates)), {"passes[1].steps[0].loss", "\"kl_top\""});
  expect_refused(over_model(kRound), {"passes[1].steps[0].step", "learn steps alone"});
  expect_refused(over_model(tuned("kl", R"("*.scale": 1)")), {"passes[1].steps[0].rates", "\"*.scale\""});
  expect_refused(over_model(R"({"step": "learn", "loss": "kl", "stream": "quantized", "rates": {"*.norm": 1}})"),
                 {"passes[1].steps[0].stream", "embedding"});
  expect_refused(with_weights(kRound + (", " + tuned("kl", R"("*.weight_scale": 1)"))),
                 {"steps[1].loss", "expected \"mse\""});
  expect_refused(with_weights(learn(R"("*.weight_scale": 1)", "exact") + ", " + kRound),
                 {"steps[0].rates", "\"*.weight_scale\""});
  expect_refused(R"({"grids": {}, "passes": [{"over": "model", "steps": [)" + tuned("kl", R"("*.clip": 1)") + "]}]}",
                 {"passes[0].steps[0].weights", "round step"});
  expect_refused(R"({"grids": {}, "passes": [{"over": "blocks and model", "steps": []}]})", {"passes[0].over"});
}

TEST(RecipeRules, APassInWindowsLearnsAndThenRounds) {
  const auto in_windows = [](const std::string& how, const std::string& steps) {
    return R"({"grids": {"weights": {}, "input_activations": {}, "kv_cache": {}}, "passes": [{"steps": [)" + kPoints +
           "]}, {" + how + R"(, "steps": [)" + steps + "]}]}";
  };
  const std::string pairs = R"("window": 2)", tuned = learn(R"("*.clip": 1)", "straight_through");
  for (const std::string how : {R"("window": 2)", R"("window": 3, "stride": 3)", R"("windows": "slider")"}) {
    const Recipe recipe = recipe_of(in_windows(how, tuned + ", " + kRound));
    EXPECT_TRUE(recipe.passes[1].in_windows());
    EXPECT_EQ(Recipe::from_json(recipe.to_json(), "again").to_json(), recipe.to_json());
  }
  EXPECT_FALSE(recipe_of(in_windows(R"("window": 1)", kRound)).passes[1].in_windows());
  expect_refused(in_windows(pairs, R"({"step": "transform", "at": ["down"]}, )" + kRound),
                 {"passes[1].steps[0].step", "a pass over single blocks before it"});
  expect_refused(in_windows(pairs, tuned + ", " + kRound + ", " + learn(R"("*.clip": 1)")),
                 {"passes[1].steps[2].step", "a later pass"});
  expect_refused(in_windows(R"("window": 2, "stride": 3)", kRound), {"passes[1].stride", "3 leaves out blocks"});
  expect_refused(in_windows(R"("window": 0)", kRound), {"passes[1].window", "expected an integer"});
  expect_refused(in_windows(R"("windows": "growing")", kRound), {"passes[1].windows", "\"slider\""});
  expect_refused(in_windows(R"("windows": "slider", "window": 2)", kRound), {"passes[1]", "unknown key \"window\""});
  expect_refused(in_windows(R"("over": "model", "window": 2)", kRound), {"passes[1]"});
}

TEST(RecipeRules, ThinMatricesNeedARank) {
  const auto step = [](const std::string& rate, const std::string& keys, const char* weights) {
    return R"({"step": "learn", "weights": ")" + std::string(weights) + R"(", "rates": {"*.)" + rate + "\": 1}" + keys +
           "}";
  };
  const std::string rank = R"(, "rank": 4)", share = R"(, "rounded_share": 0.5)";
  EXPECT_NO_THROW(recipe_of(with_weights(step("weight_lora", rank + share, "straight_through") + ", " + kRound)));
  EXPECT_NO_THROW(recipe_of(with_weights(kRound + ", " + step("weight_offset", rank, "rounded"))));
  EXPECT_NO_THROW(recipe_of(with_weights(kRound + ", " + step("weight_offset", "", "rounded"))));
  expect_refused(with_weights(step("weight_lora", "", "straight_through") + ", " + kRound),
                 {"steps[0].rank", "missing"});
  expect_refused(with_weights(step("weight_lora", rank, "exact") + ", " + kRound),
                 {"steps[0].rates", "\"straight_through\""});
  expect_refused(with_weights(kRound + ", " + step("weight_scale", rank, "rounded")),
                 {"steps[1].rank", "no rate names them"});
  expect_refused(with_weights(kRound + ", " + step("weight_scale", share, "rounded")),
                 {"steps[1]", "\"rounded_share\""});
  expect_refused(with_weights(kRound + ", " + step("weight_lora", rank, "rounded")), {"steps[1].rates"});
}

}  // namespace
}  // namespace baseq

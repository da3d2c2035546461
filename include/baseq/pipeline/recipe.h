#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "baseq/model/site.h"
#include "baseq/model/stored_model.h"
#include "baseq/quant/gptq.h"
#include "baseq/quant/low_rank.h"

#pragma GCC visibility push(default)
namespace baseq {

/// The activations that a step sees at the input of a block: those of the full-precision prefix, or those of the prefix
/// that is already quantized.
enum class Stream { kFullPrecision, kQuantized };

/// Appends one factor to the transform of each site in `at`. Factors of one site act in the order of the steps.
struct TransformStep {
  enum class Kind {
    kHadamard,  ///< QuaRot, arXiv 2404.00456
    kScale,     ///< ones, for a later step to learn
    /// A matrix per head at value, one for all heads at query_key, one of all features elsewhere; at residual the
    /// identity, for a pass over the model to turn.
    kMatrix,
    kBalance,  ///< the closed form of pipeline/balance.h: a matrix per head at value, a scale elsewhere
    kSmooth,   ///< SmoothQuant's scale, arXiv 2211.10438, Eq. 4
    kSearch,   ///< AWQ's scale, the best of 20 powers of the mean magnitudes, arXiv 2306.00978
    /// FlatQuant's pair of matrices, arXiv 2410.09426: heads and features of a head at o, near the root of the number
    /// of features elsewhere.
    kKronecker,
    kPermutation,   ///< DuQuant's zigzag of channel maxima over blocks, arXiv 2406.01721
    kCoarseToFine,  ///< CBQ's scale of the channels whose maxima stand out, arXiv 2312.07950
  };
  /// Where the matrices of kMatrix and kKronecker start.
  enum class Start {
    kIdentity,
    kHadamard,  ///< in blocks of hadamard_block_size
    kRandom,    ///< orthogonal
    kGreedy,    ///< orthogonal: DuQuant's rotation of the channels with the largest values; of kMatrix in blocks
  };
  Kind kind = Kind::kHadamard;
  std::vector<Site> at{};
  double strength = 0.5;  ///< alpha of kSmooth: how much of the outliers moves into the weights
  Start start = Start::kIdentity;
  int64_t block_size = 0;  ///< of kMatrix and kPermutation at inputs of linears: features per block; 0: all
  bool left_only = false;  ///< of kKronecker: the right one is the identity
};

/// Tries chains of transforms at each site of `at`, from which it keeps the one with the least score. Sites in the
/// order of `at`; each sees what was chosen before it.
struct ChooseStep {
  enum class By {
    kBlockLoss,      ///< squared error of the block's output, the weights around the site and its point rounded
    kRoundingError,  ///< of the weights plus that of the input per token: RoSTE, arXiv 2502.09003
    /// The first chain where the root mean square of the input is below `threshold`, else the second: LRQ-DiT's ARS,
    /// arXiv 2508.03485.
    kRms,
    kDifficulty,  ///< ActivationRange::difficulty of the input, arXiv 2506.01967
  };
  std::vector<Site> at{};
  std::vector<std::vector<TransformStep>> from{};  ///< chains whose steps name no sites
  By by = By::kBlockLoss;
  double threshold = 1;
};

/// Turns on the quant points of the sites in `at`, with the grid of the recipe.
struct PointsStep {
  /// Where a shift begins; kNone: the point has none. kMean: the means that the unquantized block shows on `stream`.
  enum class Shift { kNone, kZero, kMean };
  std::vector<Site> at{};
  double clip = 1.0;  ///< share of the range that the grid covers
  Shift shift = Shift::kNone;
  std::optional<RuntimeSmooth> runtime{};  ///< of points at inputs of linears
  Stream stream = Stream::kFullPrecision;
};

/// Learns parameters together: those of a block or of a window of blocks, so that its output keeps close to that of the
/// full-precision blocks, or in a pass over the model those of all blocks, by a loss at the head.
struct LearnStep {
  enum class Weights {
    kExact,            ///< not rounded
    kStraightThrough,  ///< those that a learned parameter changes are rounded in each forward pass
    kRounded,          ///< the codes of an earlier round step
  };
  enum class Loss {
    kMse,           ///< squared error of the block's output, in a pass over blocks; the next three are over the model
    kCrossEntropy,  ///< of the next token
    kKl,            ///< Kullback-Leibler divergence from the predictions of the full-precision model
    kKlTop,         ///< the same over its `top_k` most likely tokens alone (OSTQuant, arXiv 2501.13987)
    /// In a pass over blocks: the squared error, plus the divergence between the softmax of the two outputs over their
    /// features (CBQ, arXiv 2312.07950).
    kMseKl,
  };
  enum class Rule {
    kAdam,    ///< AdamW without weight decay
    kSign,    ///< SignSGD: each step moves a value by the rate against the sign of its gradient, arXiv 2309.05516
    kCayley,  ///< matrices by Cayley SGD (arXiv 2002.01113; SpinQuant, arXiv 2405.16406), all else as kAdam
  };
  enum class Schedule { kCosine, kLinear, kConstant };
  std::string name = "learn";  ///< in events and reports
  Loss loss = Loss::kMse;
  int64_t top_k = 1000;  ///< of kKlTop
  Weights weights = Weights::kRounded;
  /// Of kStraightThrough: the share of the inputs of each linear, from the first one, whose weights are rounded
  /// (SliderQuant, arXiv 2603.25284).
  double rounded_share = 1;
  int64_t epochs = 5;
  int64_t steps = 0;  ///< of the optimizer; unless 0, they count and not the epochs
  Rule rule = Rule::kAdam;
  /// First learning rate by parameter: "<place>.<what>", with "*" for any place. Places are the names of sites and, for
  /// what begins with weight_ and low_rank, of linears. What: scale, matrix, svd, band, kronecker, clip, shift, gain,
  /// norm, weight_clip, weight_lora, weight_offset, weight_value, weight_scale, weight_zero_point, low_rank.
  std::map<std::string, double> rates{};
  /// Of the product that weight_lora is, and unless 0 weight_offset as well (CBQ, arXiv 2312.07950).
  int64_t rank = 0;
  double final_rate = 0;  ///< each rate falls to this along the schedule
  Schedule schedule = Schedule::kCosine;
  Stream stream = Stream::kFullPrecision;
  at::ScalarType products = at::kBFloat16;  ///< dtype of the matrix products; sums stay in float32
  int64_t batch_size = 1;                   ///< windows per optimizer step
  int64_t num_monitored = 4;  ///< windows on which the best epoch is chosen; over the model no others learn from them

  /// Whether it takes steps at all.
  bool learns() const { return epochs > 0 || steps > 0; }
};

/// A correction of low rank next to every rounded weight.
struct LowRankOptions {
  /// How the remaining error of a weight is weighed: equally (arXiv 2303.08302), the mean magnitudes of the
  /// inputs (arXiv 2402.02446), their variances or their second moments (arXiv 2410.06040).
  /// kFbquant learns the correction together with the rounding, see quant/low_rank.h.
  enum class Method { kSvd, kL2qer, kQeraApprox, kQeraExact, kFbquant };
  Method method = Method::kQeraExact;
  int64_t rank = 16;
  at::ScalarType dtype = at::kBFloat16;                        ///< dtype of the factors; at::kChar: codes of 8 bits
  FbquantOptions::Start start = FbquantOptions::Start::kQera;  ///< of kFbquant, as the next two
  int64_t steps = 200;
  double learning_rate = 0.1;
};

/// Rounds the weights of a block to the recipe's grid, in the order in which data passes the linears.
struct RoundStep {
  enum class Method { kNearest, kGptq };
  Method method = Method::kNearest;
  GptqOptions gptq{};
  /// GPTAQ: rounding makes up for the difference of the two streams as well (arXiv 2504.02692).
  bool compensate_streams = false;
  /// Activations and cache are quantized while the inputs of the rounded linears are collected.
  bool quantized_inputs = false;
  std::optional<LowRankOptions> low_rank{};
};

using Step = std::variant<TransformStep, PointsStep, LearnStep, RoundStep, ChooseStep>;

/// One walk over all blocks, each of which takes all steps before the next one begins; or steps that the model takes as
/// a whole, all of them learn steps. In a walk in windows of several blocks, which has learn steps and at its end maybe
/// a round step, each learns all blocks of a window together, and a block is rounded when it leaves its last window.
struct Pass {
  enum class Over { kBlocks, kModel };
  enum class Windows {
    kFixed,   ///< `window` blocks, beginning at every `stride`-th one (CBQ, arXiv 2312.07950)
    kSlider,  ///< first growing, then pairs, at the end shrinking (SliderQuant, arXiv 2603.25284)
  };
  std::vector<Step> steps{};
  Over over = Over::kBlocks;
  Windows windows = Windows::kFixed;
  int64_t window = 1, stride = 1;  ///< of kFixed

  /// Whether several blocks learn together, but not all.
  bool in_windows() const { return over == Over::kBlocks && (windows != Windows::kFixed || window > 1); }
};

/// Another grid for some linears.
struct GridOverride {
  /// Patterns of full names such as "model.layers.0.mlp.down_proj". "*" stands for any characters. After "re:" comes a
  /// regular expression that has to match from the start of a name, as in compressed-tensors.
  std::vector<std::string> linears{};
  std::optional<QuantSpec> weights{};  ///< absent: full precision
};

/// The integer grids of a quantized model; what has none stays in full precision.
struct Grids {
  /// A grid of input_activations: one scale per token.
  static constexpr QuantSpec kPerToken{.symmetric = false, .strategy = Strategy::kToken, .dynamic = true};
  /// A grid of kv_cache: one scale per token and head. The group is a head; its size depends on the model.
  static constexpr QuantSpec kPerTokenAndHead{.symmetric = false, .strategy = Strategy::kGroup, .dynamic = true};

  std::optional<QuantSpec> weights{};            ///< of the linears of a block; needs a round step
  std::optional<QuantSpec> input_activations{};  ///< of what these linears read; needs points steps
  std::optional<QuantSpec> kv_cache{};           ///< of the keys after RoPE and the values; needs points steps
  /// Of lm_head and of the embedding, rounded to nearest; per channel or in groups. No step is needed.
  std::optional<QuantSpec> head{}, embedding{};
  /// Grids in place of `weights`, without which there are none. The last one with a pattern for a linear counts.
  std::vector<GridOverride> overrides{};

  /// The one that counts for a linear by its full name; nullptr: `weights` does.
  const GridOverride* override_of(const std::string& linear) const;
  const std::optional<QuantSpec>& weights_of(const std::string& linear) const;
  /// The grids of one block: those of its linears by the names within it, such as "mlp.down_proj".
  Grids in_block(int64_t block) const;
};

/// A method as data: grids say what is quantized, steps say how. Read one by its name or from a strict JSON file, or
/// build it:
///
///     const Recipe known = Recipe::read("baseq-w4a4kv4");
///     Recipe recipe;
///     recipe.grids.weights = QuantSpec{.num_bits = 4};
///     recipe.passes = {Pass{{RoundStep{.method = RoundStep::Method::kGptq}}}};
///     recipe.validate();
struct Recipe {
  enum class TokenWeights {
    kUniform,
    /// The squared error of a token counts relative to the energy of its target, so that the few tokens with massive
    /// activations do not decide alone.
    kInverseEnergy,
  };

  std::string name{};
  /// Dtype of the matrices that stay unquantized; absent: that of the checkpoint.
  std::optional<at::ScalarType> dtype{};
  Grids grids{};
  TokenWeights token_weights = TokenWeights::kUniform;  ///< in learning, rounding, closed-form scales and means
  int64_t num_samples = 128;                            ///< calibration windows
  int64_t seq_len = 2048;                               ///< tokens per window
  at::ScalarType activations_dtype = at::kFloat;        ///< in which the activation streams are kept between blocks
  /// Parts of the windows, a power of two: so many processes can share a run. Sums over windows are added part by part
  /// along one tree, so the result has the same bytes for every number of processes; of 1 and of 8 parts it has not.
  int64_t shards = 1;
  /// Of the products of the passes over the calibration windows: those of the blocks, and second moments for rounding.
  /// Learn steps have LearnStep::products; factors, rounding and evaluation are not affected.
  MatmulPrecision matmul_precision = MatmulPrecision::kHighest;
  std::vector<Pass> passes = std::vector<Pass>(1);

  /// @param recipe the name of a built-in recipe, else the path of a JSON file. A name means the same in every
  ///               directory: a file that has the name of a built-in recipe is read as "./NAME".
  /// Throws c10::Error for what does not exist, naming the built-in recipe that is probably meant, and what from_json()
  /// throws.
  static Recipe read(const std::string& recipe);
  /// @param path how errors name the recipe, usually its file
  /// Throws c10::Error naming step and key of an unknown key, a value out of its range, or an impossible order of
  /// steps.
  static Recipe from_json(const nlohmann::json& json, const std::string& path);
  /// Every default written out.
  nlohmann::json to_json() const;
  /// Throws c10::Error for what from_json() would refuse. Recipes that were read are valid.
  void validate() const;

  /// The steps of one type in all passes, in order: steps_of<LearnStep>().
  template <class Type>
  std::vector<const Type*> steps_of() const {
    std::vector<const Type*> found;
    for (const Pass& pass : passes) {
      for (const Step& step : pass.steps) {
        if (const auto* typed = std::get_if<Type>(&step)) found.push_back(typed);
      }
    }
    return found;
  }
  /// How errors name a step: "steps[3]", or "passes[1].steps[3]" when there are several passes.
  std::string step_path(size_t pass, size_t step) const;

  const RoundStep* round_step() const;  ///< the last one; nullptr: none
  /// All transforms that may come to stand in a block: of transform steps, and of every chain of choose steps.
  std::vector<TransformStep> transforms() const;
  bool has_transform(Site site) const;
  bool rotates_residual() const { return has_transform(Site::kResidual); }
  /// Whether a head that is the embedding stays so: what is rotated or has another grid becomes a matrix of its own.
  bool keeps_tied_head() const { return !rotates_residual() && grids.head == grids.embedding; }
  bool has_mean_shift() const;
  bool learns() const;                  ///< whether a step takes gradient steps
  bool rounding_needs_moments() const;  ///< whether a round step does, see needs_moments
  bool needs_calibration() const;
  /// Without the overrides, which stand there by the names of a model's linears: see Grids::override_of().
  QuantizationConfig quantization_config() const;
};

/// A recipe that is compiled into the library: configs/<group>/<name>.json of the repository.
struct BuiltInRecipe {
  std::string_view name{}, group{}, json{};
};

/// All of them, those of a group together.
std::span<const BuiltInRecipe> built_in_recipes();
const BuiltInRecipe* find_built_in_recipe(std::string_view name);  ///< nullptr: none has that name

/// The JSON of a recipe as Recipe::read() finds it, for override_recipe().
nlohmann::json read_recipe_json(const std::string& recipe);

/// The kinds of the steps in order, such as "hadamard, gptq, learn".
std::string describe_method(const Recipe& recipe);

/// The name in recipes of the quant point at a site: that of the site, or k_cache or v_cache.
std::string point_name(Site site);

/// GPTQ and every low-rank correction except the plain SVD need second moments of the inputs.
bool needs_moments(const RoundStep& step);

/// Sets the value at a dotted path such as "grids.weights.num_bits" or "steps.3.epochs" in a recipe's JSON. `text` is
/// JSON, or else a string. A number in the path is the index of an item of a list; everything after "rates" is one key,
/// because the names of rates contain dots. Throws c10::Error naming the part of the path that leads nowhere.
void override_recipe(nlohmann::json& recipe, const std::string& path, const std::string& text);

}  // namespace baseq
#pragma GCC visibility pop

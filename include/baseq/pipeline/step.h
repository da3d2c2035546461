#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "baseq/model/site.h"
#include "baseq/quant/fbquant.h"
#include "baseq/quant/gptq.h"

namespace baseq {

/// The activations that a step sees at the input of a block: those of the full-precision prefix, or those of the prefix
/// that is already quantized.
enum class Stream { kFullPrecision, kQuantized };

/// Appends one factor to the transform of each site in `at`. Factors of one site act in the order of the steps.
struct TransformStep {
  enum class Kind {
    kHadamard,  ///< QuaRot, arXiv 2404.00456
    kScale,     ///< ones, for a later step to learn
    kMatrix,    ///< the identity per head, for a later step to learn as a rotation (Cayley map); at value
    kBalance,   ///< the closed form of pipeline/balance.h: a matrix per head at value, a scale elsewhere
    kSmooth,    ///< SmoothQuant's scale, arXiv 2211.10438, Eq. 4
  };
  Kind kind = Kind::kHadamard;
  std::vector<Site> at{};
  double strength = 0.5;  ///< alpha of kSmooth: how much of the outliers moves into the weights
};

/// Turns on the quant points of the sites in `at`, with the grid of the recipe.
struct PointsStep {
  /// Where a shift begins; kNone: the point has none. kMean: the means that the unquantized block shows on `stream`.
  enum class Shift { kNone, kZero, kMean };
  std::vector<Site> at{};
  double clip = 1.0;  ///< share of the range that the grid covers
  Shift shift = Shift::kNone;
  Stream stream = Stream::kFullPrecision;
};

/// Learns parameters of a block together, so that its output keeps close to that of the full-precision block.
struct LearnStep {
  enum class Weights {
    kExact,            ///< not rounded
    kStraightThrough,  ///< those that a learned parameter changes are rounded in each forward pass
    kRounded,          ///< the codes of an earlier round step
  };
  std::string name = "learn";  ///< in events and reports
  Weights weights = Weights::kRounded;
  int64_t epochs = 5;
  /// First learning rate by parameter: "<place>.<what>", with "*" for any place. Places are the names of sites and, for
  /// weight_clip and low_rank, of linears. What: scale, matrix, clip, shift, gain, weight_clip, low_rank.
  std::map<std::string, double> rates{};
  double final_rate = 0;  ///< each rate falls to this along a cosine
  Stream stream = Stream::kFullPrecision;
  at::ScalarType products = at::kBFloat16;  ///< dtype of the matrix products; sums stay in float32
  int64_t batch_size = 1;                   ///< windows per optimizer step
  int64_t num_monitored = 4;                ///< windows on which the best epoch is chosen
};

/// A correction of low rank next to every rounded weight.
struct LowRankOptions {
  /// How the remaining error of a weight is weighed: equally (arXiv 2303.08302), the mean magnitudes of the
  /// inputs (arXiv 2402.02446), their variances or their second moments (arXiv 2410.06040).
  /// kFbquant learns the correction together with the rounding, see quant/fbquant.h.
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

using Step = std::variant<TransformStep, PointsStep, LearnStep, RoundStep>;

/// One walk over all blocks; each block takes all steps before the next one begins.
struct Pass {
  std::vector<Step> steps{};
};

}  // namespace baseq

#pragma once

#include <map>
#include <string>

#include "baseq/model/decoder_layer.h"
#include "baseq/pipeline/job.h"

namespace baseq {

/// ActivationRange::difficulty of values [.., channels].
double difficulty(const Tensor& values);

/// Ranges of what the six quant points of `layer` would be given, by the name of the point. The points are looked past,
/// except for their gains and shifts.
/// @param windows [n, seq, hidden_size], at the input of the block
std::map<std::string, ActivationRange> activation_ranges(const DecoderLayer& layer, const Tensor& windows,
                                                         const RotaryEmbedding& rope);

/// Lets the six quant points of `layer` add the ranges of the first batch that passes them to `ranges`, which must
/// outlive it. Changes nothing of a pass in which no point is enabled: points are looked past.
void observe_ranges(DecoderLayer& layer, std::map<std::string, ActivationRange>& ranges);

/// The points of a finished block beside the same places of the original one.
/// @param after ranges of the same points in the finished block
std::vector<PointMeasured> measure_points(int64_t block, const std::map<std::string, ActivationRange>& before,
                                          const std::map<std::string, ActivationRange>& after,
                                          const DecoderLayer& layer);

}  // namespace baseq

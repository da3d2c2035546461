#pragma once

#include "baseq/model/decoder_layer.h"
#include "pipeline/statistics.h"

namespace baseq {

/// SmoothQuant's scale at a site that linears read (arXiv 2211.10438, Eq. 4): channel j is divided by
/// max|x_j|^strength / max|w_j|^(1 - strength), the weights of the readers make up for it. A channel or a weight column
/// of zeros keeps the scale 1.
/// @param moments with MeasureOptions::with_maxima
Factor smooth(const DecoderLayer& layer, Site site, const BlockMoments& moments, double strength);

/// CBQ's scale of the channels whose largest magnitudes stand out (arXiv 2312.07950): these are divided by
/// sqrt(max|x_j| / largest of the others), the scale of all others is 1. See standing_out().
Factor coarse_to_fine(Site site, const BlockMoments& moments);

/// The least of the values that stand out; infinity where none does. Coarse: values above T = Q3 + 1.5 (Q3 - Q1) may.
/// Fine: they are cut in two where (mean of the upper - mean of the lower)^2 - variance of the lower is largest, T
/// being one of the lower.
double standing_out(const Tensor& values);

}  // namespace baseq

#pragma once

#include "baseq/model/decoder_layer.h"
#include "pipeline/statistics.h"

namespace baseq {

/// SmoothQuant's scale at a site that linears read (arXiv 2211.10438, Eq. 4): channel j is divided by
/// max|x_j|^strength / max|w_j|^(1 - strength), the weights of the readers make up for it. A channel or a weight column
/// of zeros keeps the scale 1.
/// @param moments with MeasureOptions::with_maxima
Factor smooth(const DecoderLayer& layer, Site site, const BlockMoments& moments, double strength);

}  // namespace baseq

#pragma once

#include "open_block.h"

namespace baseq {

/// What search_scale() found.
struct SearchedScale {
  Factor factor;
  double ratio = 0;        ///< r, 0 to 0.95
  double loss = 0;         ///< the squared error with `factor`
  double loss_before = 0;  ///< with r = 0, which scales nothing; never less than `loss`
};

/// AWQ's scale at a site (arXiv 2306.00978, Eq. 4 and 5): channel j is divided by m_j^r, m_j the mean magnitude of what
/// the linears there read, and they are multiplied by it. Of r = 0, 0.05, ... 0.95 it is the one with the least squared
/// error of the output of attention (at qkv, value) or of the MLP (at gate_up, down) over the first 2048 tokens of the
/// full-precision stream while the readers of the site are rounded to nearest on grids that cover everything. The
/// scales have sqrt(max min) = 1.
/// @param block none of its weights is rounded
SearchedScale search_scale(OpenBlock& block, Site site, const BlockTask& task);

}  // namespace baseq

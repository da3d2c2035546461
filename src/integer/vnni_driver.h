#pragma once

#include "vnni_wide.h"

namespace baseq {

constexpr int kNumWidths = 7;  // of weights: 2 to 8 bits

/// The loops of vnni_narrow.h and vnni_wide.h for one width of registers.
struct VnniFunctions {
  /// offsets [code rows, groups]: where sums start
  using Narrow = void (*)(const WeightPanels&, const CodeRows&, const int32_t* offsets, int64_t index, float* y);
  using Unpack = void (*)(const TilePass&, int64_t index);
  using Pack = void (*)(const TilePass&);
  int64_t tile_panels;      ///< panels that tiles take at once, at most
  const Narrow* narrow[2];  ///< of 1 and 2 planes: [bits - 2][rows of activations - 1]
  const Unpack* unpack[2];  ///< without and with pairs: [panels - 1][bits - 2]
  Pack pack[kTileKinds];
  const Unpack* tiles[kTileKinds];  ///< [panels - 1]
};

/// IntegerKernels::multiply.
/// @param pairs  Winograd's inner product where its operands fit
void multiply_by_vnni(const VnniFunctions& functions, bool pairs, const WeightPanels& weights, const CodeRows& x,
                      int64_t begin, int64_t end, void* scratch, float* y);

}  // namespace baseq

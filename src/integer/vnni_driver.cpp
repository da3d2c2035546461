#if defined(__x86_64__) && !defined(__clang__)

#include "vnni_driver.h"

namespace baseq {
namespace {

/// Columns of a group from which pairs gain: each group corrects its sums.
constexpr int64_t kPairColumns = 128;

/// The next `count` values of the scratch memory.
template <class T>
T* take(uint8_t*& scratch, int64_t count) {
  T* result = reinterpret_cast<T*>(scratch);
  scratch += count * int64_t{sizeof(T)};
  return result;
}

}  // namespace

void multiply_by_vnni(const VnniFunctions& functions, bool pairs, const WeightPanels& weights, const CodeRows& x,
                      int64_t begin, int64_t end, void* scratch, float* y) {
  if (x.rows * x.planes <= kNarrowCodeRows) {
    if (x.rows == 0) return;
    const int64_t most = kNarrowCodeRows / x.planes;
    const auto narrow = functions.narrow[x.planes - 1][(weights.num_bits - 2) * most + x.rows - 1];
    auto* offsets = static_cast<int32_t*>(scratch);
    for (int64_t i = 0; i < x.rows * x.planes * weights.groups; ++i) {
      offsets[i] = weights.zero_points ? 0 : -weights.zero_point * x.sums[i];
    }
    for (int64_t index = begin; index < end; ++index) narrow(weights, x, offsets, index, y);
    return;
  }
  const bool in_pairs = pairs && x.planes == 1 && x.max_code <= kPairOffset && weights.num_bits <= 4 &&
                        (weights.groups == 1 || weights.group_columns >= kPairColumns);
  const auto kind = static_cast<size_t>(in_pairs             ? TileKind::kPairs
                                        : x.planes == 2      ? TileKind::kTwoPlanes
                                        : weights.groups > 1 ? TileKind::kGroups
                                                             : TileKind::kOneGroup);
  const int64_t columns = weights.groups * weights.group_columns, of_panels = 2 * weights.groups * kPanelRows;
  const int64_t code_rows = code_rows_of_block(columns, x.rows * x.planes);
  auto* memory = static_cast<uint8_t*>(scratch);
  TilePass pass{.weights = weights, .x = x, .y = y};
  pass.bytes = take<uint8_t>(memory, 2 * columns * kPanelRows);
  pass.scales = take<float>(memory, of_panels);
  pass.zeros = take<int32_t>(memory, of_panels);
  pass.pair_sums = take<int32_t>(memory, of_panels);
  pass.codes = take<int8_t>(memory, code_rows * columns);
  pass.offsets = take<int32_t>(memory, code_rows * weights.groups);
  for (; pass.first_row < x.rows; pass.first_row += pass.rows) {
    pass.rows = std::min(code_rows / x.planes, x.rows - pass.first_row);
    functions.pack[kind](pass);
    for (int64_t index = begin; index < end;) {
      const int64_t panels = std::min(functions.tile_panels, end - index);
      functions.unpack[in_pairs ? 1 : 0][(panels - 1) * kNumWidths + weights.num_bits - 2](pass, index);
      functions.tiles[kind][panels - 1](pass, index);
      index += panels;
    }
  }
}

}  // namespace baseq

#endif

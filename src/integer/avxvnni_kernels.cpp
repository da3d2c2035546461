#if defined(__x86_64__) && !defined(__clang__)

#include <array>

#include "row_functions.h"
#include "vnni_driver.h"
#include "vnni_narrow.h"

/// 256-bit registers: half a slice of a panel in each. The attribute stands on every function that is not inlined.
namespace baseq {
namespace {

using Isa = AvxVnniRegisters;

template <int kBits, int kPlanes, int kRows>
__attribute__((target("avx2,avxvnni,fma"))) void narrow(const WeightPanels& weights, const CodeRows& x,
                                                        const int32_t* offsets, int64_t index, float* y) {
  narrow_panel<Isa, kBits, kPlanes, kRows * kPlanes>(weights, x, offsets, index, y);
}

template <bool kPairs, int kPanels, int kBits>
__attribute__((target("avx2,avxvnni,fma"))) void unpack(const TilePass& pass, int64_t index) {
  unpack_panels<Isa, kPairs, kBits, kPanels>(pass, index);
}

template <TileKind kKind>
__attribute__((target("avx2,avxvnni,fma"))) void pack(const TilePass& pass) {
  pack_tiles<Isa, kKind>(pass);
}

template <TileKind kKind, int kPanels>
__attribute__((target("avx2,avxvnni,fma"))) void multiply_panels(const TilePass& pass, int64_t index) {
  multiply_tiles<Isa, kKind, kPanels>(pass, index);
}

__attribute__((target("avx2,avxvnni,fma"))) void project(const FactorPanels& factors, const float* values, int64_t rows,
                                                         float* out) {
  const int64_t stride = factors.panels * kPanelRows;
  for (int64_t panel = 0; panel < factors.panels; ++panel) {
    vnni_factors<Isa>(factors, panel, values, rows, out + panel * kPanelRows, stride);
  }
}

template <int kPlanes, int... i>
constexpr std::array<VnniFunctions::Narrow, sizeof...(i)> narrow_table(std::integer_sequence<int, i...>) {
  constexpr int kMost = kNarrowCodeRows / kPlanes;
  return {narrow<2 + i / kMost, kPlanes, 1 + i % kMost>...};
}
template <bool kPairs, int... i>
constexpr std::array<VnniFunctions::Unpack, sizeof...(i)> unpack_table(std::integer_sequence<int, i...>) {
  // Pairs are made of up to 4 bits.
  return {unpack < kPairs, 1 + i / kNumWidths, kPairs ? std::min(2 + i % kNumWidths, 4) : 2 + i % kNumWidths > ...};
}
template <TileKind kKind, int... i>
constexpr std::array<VnniFunctions::Unpack, sizeof...(i)> tile_table(std::integer_sequence<int, i...>) {
  return {multiply_panels<kKind, 1 + i>...};
}

constexpr std::make_integer_sequence<int, Isa::kTilePanels> kPanelCounts{};
constexpr std::make_integer_sequence<int, Isa::kTilePanels * kNumWidths> kWidths{};
constexpr auto kNarrowOne = narrow_table<1>(std::make_integer_sequence<int, kNumWidths * kNarrowCodeRows>{});
constexpr auto kNarrowTwo = narrow_table<2>(std::make_integer_sequence<int, kNumWidths * kNarrowCodeRows / 2>{});
constexpr auto kUnpackPlain = unpack_table<false>(kWidths), kUnpackPairs = unpack_table<true>(kWidths);
constexpr auto kOneGroup = tile_table<TileKind::kOneGroup>(kPanelCounts);
constexpr auto kTwoPlanes = tile_table<TileKind::kTwoPlanes>(kPanelCounts);
constexpr auto kPairs = tile_table<TileKind::kPairs>(kPanelCounts);
constexpr auto kGroups = tile_table<TileKind::kGroups>(kPanelCounts);

constexpr VnniFunctions kFunctions{
    .tile_panels = Isa::kTilePanels,
    .narrow = {kNarrowOne.data(), kNarrowTwo.data()},
    .unpack = {kUnpackPlain.data(), kUnpackPairs.data()},
    .pack = {pack<TileKind::kOneGroup>, pack<TileKind::kTwoPlanes>, pack<TileKind::kPairs>, pack<TileKind::kGroups>},
    .tiles = {kOneGroup.data(), kTwoPlanes.data(), kPairs.data(), kGroups.data()}};

template <bool kInPairs>
void multiply(const WeightPanels& weights, const CodeRows& x, int64_t begin, int64_t end, void* scratch, float* y) {
  multiply_by_vnni(kFunctions, kInPairs, weights, x, begin, end, scratch, y);
}

bool supported() {
  return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0 &&
         __builtin_cpu_supports("avxvnni") != 0;
}

}  // namespace

const IntegerKernels kAvxVnniKernels{"avxvnni",        supported,          multiply<true>,         project,
                                     Avx2Rows::attend, Avx2Rows::rms_norm, Avx2Rows::silu_product, Avx2Rows::rope};

}  // namespace baseq

#endif

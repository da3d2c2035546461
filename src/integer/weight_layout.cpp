#include "weight_layout.h"

#include <algorithm>

#include "panel_arithmetic.h"

namespace baseq {
namespace {

/// Packs one chunk of unpacked codes [slices, 64].
void pack_chunk(const uint8_t* codes, int num_bits, uint8_t* out) {
  for (int width = 8; width > 0; width /= 2) {
    if ((num_bits & width) == 0) continue;
    const PlaneShift plane = plane_of(num_bits, width);
    const int mask = (1 << width) - 1, in_block = 8 / width;
    for (int slice = 0; slice < kSlicesPerChunk; ++slice) {
      uint8_t* block = out + plane.offset + slice / in_block * kBlockBytes;
      for (int64_t i = 0; i < kBlockBytes; ++i) {
        const int part = codes[slice * kBlockBytes + i] >> plane.shift & mask;
        block[i] = static_cast<uint8_t>(block[i] | part << (slice % in_block * width));
      }
    }
  }
}

}  // namespace

void pack_panel_codes(const PanelSource& source, uint8_t* out) {
  const auto num_bits = static_cast<int>(source.num_bits);
  const int offset = 1 << (num_bits - 1);
  const int64_t chunk_bytes = num_bits * kBlockBytes;
  for (int64_t group = 0; group < source.features; group += source.group_size) {
    for (int64_t first = 0; first < source.group_size; first += kChunkColumns, out += chunk_bytes) {
      uint8_t codes[kSlicesPerChunk * kBlockBytes] = {};
      const int64_t columns = std::min(kChunkColumns, source.group_size - first);
      for (int64_t row = 0; row < source.rows; ++row) {
        const int8_t* from = source.codes + row * source.features + group + first;
        for (int64_t k = 0; k < columns; ++k) {
          codes[k / kSliceColumns * kBlockBytes + row * kSliceColumns + k % kSliceColumns] =
              static_cast<uint8_t>(from[k] + offset);
        }
      }
      std::fill_n(out, chunk_bytes, uint8_t{0});
      pack_chunk(codes, num_bits, out);
    }
  }
}

float weight_row_sum(const PanelSource& source, int64_t row, const float* scale, const uint8_t* zero_points) {
  const int64_t offset = int64_t{1} << (source.num_bits - 1);
  const int8_t* codes = source.codes + row * source.features;
  double total = 0;
  for (int64_t group = 0; group * source.group_size < source.features; ++group) {
    const int64_t zero = (zero_points == nullptr ? offset : zero_points[group]) - offset;
    int64_t sum = 0;
    for (int64_t k = 0; k < source.group_size; ++k) sum += codes[group * source.group_size + k] - zero;
    total += static_cast<double>(scale[group]) * static_cast<double>(sum);
  }
  return static_cast<float>(total);
}

}  // namespace baseq

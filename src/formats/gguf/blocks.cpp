#include "formats/gguf/blocks.h"

#include <ATen/ATen.h>

#include <functional>
#include <numeric>

namespace baseq {
namespace {

constexpr int64_t kBlock = 32;        // of Q8_0, Q4_0, Q4_1
constexpr int64_t kSuperBlock = 256;  // of Q6_K

struct TypeInfo {
  const char* name;
  int64_t block_size, block_bytes;
};

TypeInfo info(GgufType type) {
  switch (type) {
    case GgufType::kF32:
      return {"F32", 1, 4};
    case GgufType::kF16:
      return {"F16", 1, 2};
    case GgufType::kBF16:
      return {"BF16", 1, 2};
    case GgufType::kQ4_0:
      return {"Q4_0", kBlock, 18};
    case GgufType::kQ4_1:
      return {"Q4_1", kBlock, 20};
    case GgufType::kQ8_0:
      return {"Q8_0", kBlock, 34};
    case GgufType::kQ6_K:
      return {"Q6_K", kSuperBlock, 210};
  }
  TORCH_CHECK(false, "GGUF type ", static_cast<uint32_t>(type),
              " is not supported; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q6_K");
}

/// The bytes of a float16 tensor, one more dimension of 2.
Tensor half_bytes(const Tensor& values) { return values.to(at::kHalf).contiguous().unsqueeze(-1).view(at::kByte); }

/// Blocks start anywhere: a copy is aligned.
Tensor halves(const Tensor& bytes) { return bytes.contiguous().clone().view(at::kHalf); }
Tensor half_values(const Tensor& bytes) { return halves(bytes).to(at::kFloat); }

/// Low nibbles, then high ones: uint8 [blocks, 32].
Tensor nibbles(const Tensor& packed) {
  return at::cat({at::bitwise_and(packed, 15), at::bitwise_right_shift(packed, 4)}, 1);
}

/// One row per block.
Tensor symmetric_blocks(GgufType type, const Tensor& bytes) {
  TORCH_CHECK(type == GgufType::kQ8_0 || type == GgufType::kQ4_0, info(type).name, " has no symmetric codes");
  return bytes.view({-1, info(type).block_bytes});
}

/// Two halves of 128 values, each: 64 bytes of low nibbles, 32 of two high bits, 8 of 16 scales.
Tensor values_q6_k(const Tensor& blocks) {
  const int64_t count = blocks.size(0);
  const Tensor low = blocks.narrow(1, 0, 128).reshape({count, 2, 1, 64});
  const Tensor high = blocks.narrow(1, 128, 64).reshape({count, 2, 1, 32});
  const Tensor scales = blocks.narrow(1, 192, 16).contiguous().view(at::kChar).to(at::kFloat);
  const Tensor d = half_values(blocks.narrow(1, 208, 2));
  const Tensor low_bits = at::cat({at::bitwise_and(low, 15), at::bitwise_right_shift(low, 4)}, 2);
  const Tensor shifts = at::tensor({0, 2, 4, 6}, at::kByte).view({1, 1, 4, 1});
  const Tensor high_bits = at::bitwise_and(at::bitwise_right_shift(high, shifts), 3);
  const Tensor codes = at::bitwise_or(low_bits.reshape({count, kSuperBlock}),
                                      at::bitwise_left_shift(high_bits.reshape({count, kSuperBlock}), 4));
  const Tensor centred = (codes.to(at::kFloat) - 32).view({count, 16, 16});
  return centred * (d * scales).unsqueeze(-1);
}

}  // namespace

const char* gguf_type_name(GgufType type) { return info(type).name; }
int64_t gguf_block_size(GgufType type) { return info(type).block_size; }
int64_t gguf_block_bytes(GgufType type) { return info(type).block_bytes; }

int64_t gguf_num_bytes(GgufType type, const std::vector<int64_t>& shape) {
  const TypeInfo of = info(type);
  const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  TORCH_CHECK(count == 0 || of.block_size == 1 || (!shape.empty() && shape.back() % of.block_size == 0), of.name,
              ": the shape is ", shape, ", whose last dimension blocks of ", of.block_size, " do not divide");
  return count / of.block_size * of.block_bytes;
}

Tensor gguf_blocks(GgufType type, const Tensor& codes, const Tensor& scale, const Tensor& zero_point) {
  const int64_t rows = codes.size(0), blocks = codes.size(1) / kBlock;
  const auto by_block = [&](const Tensor& qparam) {  // [rows, blocks]
    return qparam.expand({rows, -1}).repeat_interleave(blocks / qparam.size(1), 1);
  };
  const Tensor grouped = codes.contiguous().view({rows, blocks, kBlock});
  const Tensor d = by_block(scale);
  std::vector<Tensor> parts = {half_bytes(d)};
  if (type == GgufType::kQ8_0) {
    parts.push_back(grouped.view(at::kByte));
  } else {
    if (type == GgufType::kQ4_1) {
      parts.push_back(half_bytes(zero_point.defined() ? -(by_block(zero_point) + 8) * d : -8 * d));
    }
    const Tensor unsigned_codes = (grouped + 8).to(at::kByte);
    const Tensor low = unsigned_codes.narrow(2, 0, 16), high = unsigned_codes.narrow(2, 16, 16);
    parts.push_back(at::bitwise_or(low, at::bitwise_left_shift(high, 4)));
  }
  return at::cat(parts, 2).view({rows, -1});
}

Tensor gguf_codes(GgufType type, const Tensor& bytes, const std::vector<int64_t>& shape) {
  const Tensor blocks = symmetric_blocks(type, bytes);
  const Tensor codes = type == GgufType::kQ8_0 ? blocks.narrow(1, 2, kBlock).contiguous().view(at::kChar)
                                               : nibbles(blocks.narrow(1, 2, 16)).to(at::kChar) - 8;
  return codes.view(shape);
}

Tensor gguf_scales(GgufType type, const Tensor& bytes, const std::vector<int64_t>& shape) {
  return halves(symmetric_blocks(type, bytes).narrow(1, 0, 2)).view(gguf_scales_shape(shape));
}

std::vector<int64_t> gguf_scales_shape(std::vector<int64_t> shape) {
  shape.back() /= kBlock;
  return shape;
}

at::ScalarType gguf_values_dtype(GgufType type) {
  return type == GgufType::kF16 ? at::kHalf : type == GgufType::kBF16 ? at::kBFloat16 : at::kFloat;
}

Tensor gguf_values(GgufType type, const Tensor& bytes, const std::vector<int64_t>& shape) {
  switch (type) {
    case GgufType::kF32:
      return bytes.clone().view(at::kFloat).view(shape);
    case GgufType::kF16:
      return bytes.clone().view(at::kHalf).view(shape);
    case GgufType::kBF16:
      return bytes.clone().view(at::kBFloat16).view(shape);
    case GgufType::kQ6_K:
      return values_q6_k(bytes.view({-1, gguf_block_bytes(type)})).view(shape);
    case GgufType::kQ4_1: {
      const Tensor blocks = bytes.view({-1, gguf_block_bytes(type)});
      const Tensor d = half_values(blocks.narrow(1, 0, 2)), minimum = half_values(blocks.narrow(1, 2, 2));
      return (nibbles(blocks.narrow(1, 4, 16)).to(at::kFloat) * d + minimum).view(shape);
    }
    case GgufType::kQ4_0:
    case GgufType::kQ8_0: {
      const Tensor codes = gguf_codes(type, bytes, shape).to(at::kFloat);
      return (codes.view({-1, kBlock}) * gguf_scales(type, bytes, shape).to(at::kFloat).view({-1, 1})).view(shape);
    }
  }
  TORCH_CHECK(false, "GGUF type ", static_cast<uint32_t>(type), " is not supported");
}

}  // namespace baseq

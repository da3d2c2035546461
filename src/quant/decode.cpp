#include "baseq/quant/decode.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "baseq/quant/pack.h"
#include "decode_kernel.h"

namespace baseq {
namespace {

struct Sizes {
  int64_t out_features, in_features, groups, rank;
};

void check(const Tensor& t, const char* name, std::initializer_list<at::ScalarType> dtypes, at::IntArrayRef sizes) {
  TORCH_CHECK(t.device().is_cpu() && t.sizes() == sizes &&
                  std::find(dtypes.begin(), dtypes.end(), t.scalar_type()) != dtypes.end(),
              "decode_linear: ", name, " is ", t.scalar_type(), " ", t.sizes(), " on ", t.device(), ", expected ",
              *dtypes.begin(), " ", sizes, " on cpu");
}

Sizes checked_sizes(const PackedLinear& linear, const Tensor& x) {
  const QuantSpec& spec = linear.spec;
  const int64_t bits = spec.num_bits, in = linear.in_features;
  TORCH_CHECK(bits >= 2 && bits <= 8, "decode_linear: num_bits is ", bits, ", expected 2 to 8");
  TORCH_CHECK(in > 0, "decode_linear: in_features is ", in, ", expected at least 1");
  TORCH_CHECK(spec.strategy != Strategy::kToken && !spec.dynamic,
              "decode_linear: the grid is one of activations, expected a static one a tensor, channel or group");
  TORCH_CHECK(linear.weight_packed.defined() && linear.weight_packed.dim() == 2,
              "decode_linear: weight_packed is not a matrix");
  Sizes sizes{linear.weight_packed.size(0), in, 1, 0};
  if (spec.strategy == Strategy::kGroup) {
    const int64_t multiple = codes_per_lane(bits);
    TORCH_CHECK(spec.group_size > 0 && spec.group_size % multiple == 0 && in % spec.group_size == 0,
                "decode_linear: group_size is ", spec.group_size, ", expected a multiple of ", multiple, " for ", bits,
                " bits that divides the ", in, " inputs");
    sizes.groups = in / spec.group_size;
  }
  const int64_t out = sizes.out_features;
  const bool one_scale = spec.strategy == Strategy::kTensor;
  check(linear.weight_packed, "weight_packed", {at::kInt}, {out, (in * bits + 31) / 32});
  TORCH_CHECK(linear.weight_scale.defined(), "decode_linear: there is no weight_scale");
  check(linear.weight_scale, "weight_scale", {at::kFloat, at::kBFloat16, at::kHalf},
        {one_scale ? 1 : out, sizes.groups});
  TORCH_CHECK(linear.weight_zero_point.defined() != spec.symmetric, "decode_linear: ",
              spec.symmetric ? "a symmetric grid has zero points" : "an asymmetric grid has no weight_zero_point");
  if (linear.weight_zero_point.defined()) {
    check(linear.weight_zero_point, "weight_zero_point", {at::kInt},
          {((one_scale ? 1 : out) * bits + 31) / 32, sizes.groups});
  }
  const auto& [A, B, A_scale, B_scale] = linear.lora;
  TORCH_CHECK(A.defined() == B.defined(), "decode_linear: only one of lora_A and lora_B is there");
  if (A.defined()) {
    TORCH_CHECK(A.dim() == 2, "decode_linear: lora_A is ", A.sizes(), ", expected [rank, in_features]");
    sizes.rank = A.size(0);
    check(A, "lora_A", {at::kBFloat16, at::kChar}, {sizes.rank, in});
    check(B, "lora_B", {A.scalar_type()}, {out, sizes.rank});
    const bool codes = A.scalar_type() == at::kChar;
    TORCH_CHECK(A_scale.defined() == codes && B_scale.defined() == codes,
                "decode_linear: int8 factors and only they have scales");
    if (codes) {
      check(A_scale, "lora_A_scale", {at::kFloat}, {sizes.rank, 1});
      check(B_scale, "lora_B_scale", {at::kFloat}, {1, sizes.rank});
    }
  }
  if (linear.bias.defined()) check(linear.bias, "bias", {at::kFloat}, {out});
  TORCH_CHECK(x.defined(), "decode_linear: there is no x");
  TORCH_CHECK(x.device().is_cpu() && at::isFloatingType(x.scalar_type()) && (x.dim() == 1 || x.dim() == 2) &&
                  x.size(-1) == in && x.numel() == in,
              "decode_linear: x is ", x.scalar_type(), " ", x.sizes(), " on ", x.device(),
              ", expected one token of floating type [", in, "] or [1, ", in, "] on cpu");
  return sizes;
}

/// float32 x in the order of the blocks, behind it -code_offset times the sum of each lane: [blocks * (codes + 1) *
/// lanes].
Tensor in_blocks(const Tensor& x, int64_t num_bits, int64_t lanes) {
  const int64_t codes = codes_per_lane(num_bits), width = lanes * codes;
  const int64_t blocks = (x.numel() + width - 1) / width;
  const Tensor padded = at::constant_pad_nd(x, {0, blocks * width - x.numel()});
  const Tensor result = at::empty({blocks * (codes + 1) * lanes}, at::kFloat);
  auto* values = result.mutable_data_ptr<float>();
  auto* start = values + blocks * width;
  const auto* source = padded.const_data_ptr<float>();
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      float sum = 0;
      for (int64_t k = 0; k < codes; ++k) {
        const float value = *source++;
        values[block * width + k * lanes + lane] = value;
        sum += value;
      }
      *start++ = -code_offset(num_bits) * sum;
    }
  }
  return result;
}

template <class T>
const T* data(const Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}

Tensor contiguous(const Tensor& t) { return t.defined() ? t.contiguous() : t; }

}  // namespace

PackedLinear pack_linear(const QuantizedWeight& weight, const LowRankFactors& lora, const Tensor& bias) {
  const QuantSpec& spec = weight.spec;
  const QParams& qparams = weight.qparams;
  TORCH_CHECK(weight.codes.dim() == 2 && weight.codes.scalar_type() == at::kChar, "pack_linear: codes are ",
              weight.codes.toString(), " of size ", weight.codes.sizes(),
              ", expected int8 [out_features, in_features]");
  return {.spec = spec,
          .in_features = weight.codes.size(1),
          .weight_packed = pack_to_int32(weight.codes, spec.num_bits),
          .weight_scale = qparams.scale.to(spec.scale_dtype),
          .weight_zero_point =
              qparams.zero_point.defined() ? pack_zero_points(qparams.zero_point, spec.num_bits) : Tensor(),
          .lora = lora,
          .bias = bias};
}

Tensor decode_linear(const PackedLinear& linear, const Tensor& x) { return decode_linear(linear, x, decode_kernels()); }

Tensor decode_linear(const PackedLinear& linear, const Tensor& x, const DecodeKernels& kernels) {
  const auto [out_features, in_features, groups, rank] = checked_sizes(linear, x);
  const int64_t num_bits = linear.spec.num_bits, codes = codes_per_lane(num_bits), lanes = kernels.lanes;
  const Tensor packed = contiguous(linear.weight_packed), scale = contiguous(linear.weight_scale);
  const Tensor zero_point = contiguous(linear.weight_zero_point), bias = contiguous(linear.bias);
  const Tensor down = contiguous(linear.lora.A), up = contiguous(linear.lora.B);
  const Tensor input = x.detach().reshape({-1}).to(at::kFloat).contiguous();

  Tensor t = at::empty({rank}, at::kFloat);
  const Tensor ordered = at::empty({std::max(rank, in_features)}, at::kFloat);
  FactorType factor_type = FactorType::kBFloat16;
  if (rank > 0) {
    if (down.scalar_type() == at::kChar) factor_type = FactorType::kInt8;
    factor_order(factor_type, data<float>(input), in_features, lanes, ordered.mutable_data_ptr<float>());
    at::parallel_for(0, rank, 1 + (1 << 15) / in_features, [&](int64_t begin, int64_t end) {
      kernels.project(factor_type, down.const_data_ptr(), data<float>(ordered), in_features, begin, end,
                      t.mutable_data_ptr<float>());
    });
    if (factor_type == FactorType::kInt8) t.mul_(linear.lora.A_scale.reshape(-1)).mul_(linear.lora.B_scale.reshape(-1));
    factor_order(factor_type, data<float>(t), rank, lanes, ordered.mutable_data_ptr<float>());
  }

  const Tensor blocks = in_blocks(input, num_bits, lanes), y = at::empty({out_features}, at::kFloat);
  const Tensor group_sums = zero_point.defined() ? input.view({groups, -1}).sum(1) : Tensor();
  DecodeRows rows;
  rows.num_bits = num_bits;
  rows.blocks = blocks.numel() / ((codes + 1) * lanes);
  rows.packed = data<uint32_t>(packed);
  rows.packed_end = rows.packed + packed.numel();
  rows.words = packed.size(1);
  rows.x = data<float>(blocks);
  rows.x_start = rows.x + rows.blocks * codes * lanes;
  rows.scale_type = scale.scalar_type() == at::kFloat      ? ScaleType::kFloat
                    : scale.scalar_type() == at::kBFloat16 ? ScaleType::kBFloat16
                                                           : ScaleType::kHalf;
  rows.scale = scale.const_data_ptr();
  rows.zero_point = data<uint32_t>(zero_point);
  rows.group_sums = data<float>(group_sums);
  rows.groups = groups;
  rows.lanes_per_group = groups == 1 ? rows.blocks * lanes : linear.spec.group_size / codes;
  rows.one_scale = linear.spec.strategy == Strategy::kTensor;
  rows.factor_type = factor_type;
  rows.lora_b = data<void>(up);
  rows.t = data<float>(ordered);
  rows.rank = rank;
  rows.bias = data<float>(bias);
  rows.y = y.mutable_data_ptr<float>();
  at::parallel_for(0, out_features, 1 + (1 << 15) / in_features, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({rows.groups + rows_together(lanes) * (rows.blocks + 1) * lanes}, at::kFloat);
    kernels.decode(rows, begin, end, scratch.mutable_data_ptr<float>());
  });
  return (x.dim() == 1 ? y : y.unsqueeze(0)).to(x.scalar_type());
}

}  // namespace baseq

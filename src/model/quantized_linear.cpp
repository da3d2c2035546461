#include "quantized_linear.h"

#include <ATen/ATen.h>

#include "baseq/quant/quantize.h"
#include "io/dtype_name.h"

namespace baseq {
namespace {

using Codes = LinearFormat::Codes;

/// int32 [columns] as the checkpoint stores them.
Tensor group_index(const Checkpoint& checkpoint, const std::string& name) {
  const Tensor index = checkpoint.tensor(name + ".weight_g_idx");
  TORCH_CHECK(index.dim() == 1 && at::isIntegralType(index.scalar_type(), /*includeBool=*/false), name,
              ".weight_g_idx: is ", dtype_name(index.scalar_type()), " of size ", index.sizes(),
              ", expected integers [in_features]");
  return index.to(at::kLong);
}

Tensor read_codes(const Checkpoint& checkpoint, const std::string& name, const LinearFormat& format) {
  if (format.codes == Codes::kInt8) {
    const Tensor codes = checkpoint.tensor(name + ".weight");
    TORCH_CHECK(codes.dim() == 2 && codes.scalar_type() == at::kChar, name, ".weight: is ",
                dtype_name(codes.scalar_type()), " of size ", codes.sizes(),
                ", expected I8 [out_features, in_features]");
    return codes.clone();
  }
  const Tensor shape = checkpoint.tensor(name + ".weight_shape");
  TORCH_CHECK(at::isIntegralType(shape.scalar_type(), /*includeBool=*/false) && shape.dim() == 1 && shape.numel() == 2,
              name, ".weight_shape: expected two integers");
  const int64_t rows = shape[0].item<int64_t>(), columns = shape[1].item<int64_t>();
  const Tensor packed = checkpoint.tensor(name + ".weight_packed");
  TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == at::kInt && packed.numel() > 0, name, ".weight_packed: is ",
              dtype_name(packed.scalar_type()), " of size ", packed.sizes(), ", expected I32 in two dimensions");
  const int64_t num_bits = format.weights->num_bits, per_word = 32 / num_bits;
  Tensor codes;
  // Without padding the two are the same words.
  if (format.codes == Codes::kPadded && 32 % num_bits != 0) {
    TORCH_CHECK(columns > 0 && (columns - 1) / per_word + 1 == packed.size(1), name, ".weight_packed: size is ",
                packed.sizes(), " but weight_shape says ", columns, " columns of ", num_bits, " bits, ", per_word,
                " in a word");
    codes = unpack_from_int32(packed.reshape({-1, 1}), num_bits, per_word).view({packed.size(0), -1});
    codes = codes.narrow(1, 0, columns).contiguous();
  } else {
    // columns * num_bits might not fit in 64 bits.
    const int64_t words = packed.size(1);
    TORCH_CHECK(columns <= words * 32 / num_bits && columns > (words - 1) * 32 / num_bits, name,
                ".weight_packed: size is ", packed.sizes(), " but weight_shape says ", columns, " columns of ",
                num_bits, " bits");
    codes = unpack_from_int32(packed, num_bits, columns);
  }
  TORCH_CHECK(codes.size(0) == rows, name, ": weight_packed has ", codes.size(0), " rows but weight_shape says ", rows);
  return codes;
}

/// float32 [rows, groups] of a scale or zero point that may be stored with fewer dimensions.
Tensor by_group(const Tensor& stored, const QuantSpec& spec, int64_t out_features, const std::string& name) {
  if (stored.dim() == 2) return stored.to(at::kFloat);
  const int64_t rows = spec.strategy == Strategy::kTensor ? 1 : out_features;
  TORCH_CHECK(stored.numel() == rows, name, ": size is ", stored.sizes(), ", expected ", rows, " values");
  return stored.to(at::kFloat).reshape({rows, 1});
}

Tensor read_zero_points(const Checkpoint& checkpoint, const std::string& name, const LinearFormat& format,
                        const Tensor& scale, int64_t out_features) {
  const std::string full = name + ".weight_zero_point";
  const Tensor stored = checkpoint.tensor(full);
  const QuantSpec& spec = *format.weights;
  // Integers of another width than packed words are zero points as they are.
  if (stored.scalar_type() != at::kInt || format.codes == Codes::kInt8) {
    return by_group(stored, spec, out_features, full);
  }
  if (format.codes == Codes::kPadded && 32 % spec.num_bits != 0) {
    const int64_t per_word = 32 / spec.num_bits;
    TORCH_CHECK(stored.dim() == 2 && stored.size(0) * per_word >= scale.size(0), full, ": size is ", stored.sizes(),
                " but weight_scale has ", scale.size(0), " rows");
    const Tensor words = stored.t().reshape({-1, 1});
    const Tensor zero_points = unpack_from_int32(words, spec.num_bits, per_word).view({stored.size(1), -1});
    return zero_points.narrow(1, 0, scale.size(0)).t().to(at::kFloat).contiguous();
  }
  TORCH_CHECK(stored.dim() == 2 && stored.size(0) == (scale.size(0) * spec.num_bits + 31) / 32, full, ": size is ",
              stored.sizes(), " but weight_scale has ", scale.size(0), " rows");
  return unpack_zero_points(stored, spec.num_bits, scale.size(0));
}

}  // namespace

void complete_format(LinearFormat& format, const Checkpoint& checkpoint, const std::string& name) {
  if (!format.weights) return;
  const std::string scale = name + ".weight_scale";
  if (checkpoint.contains(scale)) {
    const at::ScalarType dtype = format.weights->scale_dtype = checkpoint.info(scale).dtype;
    TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, scale, ": dtype is ",
                dtype_name(dtype), ", expected F32, F16 or BF16");
  }
  if (format.weights->strategy == Strategy::kGroup && checkpoint.contains(name + ".weight_g_idx")) {
    const Tensor index = group_index(checkpoint, name);
    const Tensor in_order = at::arange(index.size(0)).floor_divide_(format.weights->group_size);
    // compressed-tensors fills the index of a layer without one with -1.
    format.group_index = !at::equal(index, in_order) && !index.eq(-1).all().item<bool>();
  }
}

std::vector<std::string> quantized_weight_names(const std::string& name, const LinearFormat& format) {
  std::vector<std::string> names = {name + (format.codes == Codes::kInt8 ? ".weight" : ".weight_packed"),
                                    name + ".weight_scale"};
  if (!format.weights->symmetric) names.push_back(name + ".weight_zero_point");
  return names;
}

Linear read_quantized_weight(const Checkpoint& checkpoint, const std::string& name, const LinearFormat& format,
                             bool dequantized) {
  const QuantSpec& spec = *format.weights;
  QuantizedWeight quantized{.spec = spec};
  quantized.codes = read_codes(checkpoint, name, format);
  const int64_t rows = quantized.codes.size(0), columns = quantized.codes.size(1);
  const bool grouped = spec.strategy == Strategy::kGroup;
  TORCH_CHECK(!grouped || columns % spec.group_size == 0, name, ": groups of ", spec.group_size, " do not divide ",
              columns, " columns");
  const std::vector<int64_t> expected = {spec.strategy == Strategy::kTensor ? 1 : rows,
                                         grouped ? columns / spec.group_size : 1};
  const auto checked = [&](const Tensor& qparam, const char* part) {
    TORCH_CHECK(qparam.sizes() == expected, name, part, ": size is ", qparam.sizes(), ", expected ",
                at::IntArrayRef(expected));
    return qparam;
  };
  QParams& qparams = quantized.qparams;
  qparams.scale =
      checked(by_group(checkpoint.tensor(name + ".weight_scale"), spec, rows, name + ".weight_scale"), ".weight_scale");
  if (!spec.symmetric) {
    qparams.zero_point = checked(read_zero_points(checkpoint, name, format, qparams.scale, rows), ".weight_zero_point");
  }
  Linear linear;
  if (!format.group_index) {
    if (dequantized) linear.weight = quantized.dequantized();
    linear.quantized = std::move(quantized);
    return linear;
  }
  const Tensor index = group_index(checkpoint, name);
  TORCH_CHECK(index.size(0) == columns && index.min().item<int64_t>() >= 0 && index.max().item<int64_t>() < expected[1],
              name, ".weight_g_idx: expected ", columns, " groups from 0 to ", expected[1] - 1);
  linear.weight = quantized.codes.to(at::kFloat);
  if (!spec.symmetric) linear.weight -= qparams.zero_point.index_select(1, index);
  linear.weight *= qparams.scale.index_select(1, index);
  return linear;
}

Tensor read_quantized_rows(const Checkpoint& checkpoint, const std::string& name, const LinearFormat& format,
                           const Tensor& ids) {
  TORCH_CHECK(format.codes == Codes::kPacked && !format.group_index, name, ": rows are read of packed codes alone");
  const QuantSpec& spec = *format.weights;
  const Tensor shape = checkpoint.tensor(name + ".weight_shape");
  const Tensor packed = checkpoint.tensor(name + ".weight_packed");
  TORCH_CHECK(shape.numel() == 2 && packed.dim() == 2 && packed.size(0) == shape[0].item<int64_t>(), name,
              ".weight_packed: size is ", packed.sizes(), " but weight_shape is ", shape);
  const int64_t rows = packed.size(0);
  QuantizedWeight selected{.spec = spec};
  selected.codes = unpack_from_int32(packed.index_select(0, ids), spec.num_bits, shape[1].item<int64_t>());
  const auto of_rows = [&](const Tensor& qparam) { return qparam.size(0) == 1 ? qparam : qparam.index_select(0, ids); };
  // Scales are widened after the selection: a vocabulary has many.
  const Tensor scale = checkpoint.tensor(name + ".weight_scale");
  selected.qparams.scale =
      scale.dim() == 2 ? of_rows(scale).to(at::kFloat) : of_rows(by_group(scale, spec, rows, name + ".weight_scale"));
  if (!spec.symmetric) {
    selected.qparams.zero_point =
        of_rows(read_zero_points(checkpoint, name, format, by_group(scale, spec, rows, name + ".weight_scale"), rows));
  }
  return selected.dequantized();
}

QuantizedWeight select_rows(const QuantizedWeight& weight, const Tensor& ids) {
  QuantizedWeight selected{.spec = weight.spec, .codes = weight.codes.index_select(0, ids)};
  selected.qparams.scale = weight.qparams.scale.index_select(0, ids);
  const Tensor& zero_point = weight.qparams.zero_point;
  if (zero_point.defined()) selected.qparams.zero_point = zero_point.index_select(0, ids);
  return selected;
}

std::map<std::string, Tensor> quantized_weight_tensors(const std::string& name, const QuantizedWeight& weight) {
  const int64_t num_bits = weight.spec.num_bits;
  std::map<std::string, Tensor> tensors;
  const auto put = [&](const char* part, const Tensor& tensor) {
    tensors[name + part] = tensor.detach().to(at::kCPU).contiguous();
  };
  put(".weight_packed", pack_to_int32(weight.codes, num_bits));
  put(".weight_scale", weight.qparams.scale.to(weight.spec.scale_dtype));
  put(".weight_shape", at::tensor({weight.codes.size(0), weight.codes.size(1)}, at::kLong));
  if (weight.qparams.zero_point.defined()) {
    put(".weight_zero_point", pack_zero_points(weight.qparams.zero_point, num_bits));
  }
  return tensors;
}

std::map<std::string, TensorInfo> quantized_weight_infos(const std::string& name, const QuantSpec& spec,
                                                         int64_t out_features, int64_t in_features) {
  const auto words = [&](int64_t codes) { return (codes * spec.num_bits + 31) / 32; };
  const int64_t rows = spec.strategy == Strategy::kTensor ? 1 : out_features;
  const int64_t groups = spec.strategy == Strategy::kGroup ? in_features / spec.group_size : 1;
  std::map<std::string, TensorInfo> infos = {{name + ".weight_packed", {at::kInt, {out_features, words(in_features)}}},
                                             {name + ".weight_scale", {spec.scale_dtype, {rows, groups}}},
                                             {name + ".weight_shape", {at::kLong, {2}}}};
  if (!spec.symmetric) infos[name + ".weight_zero_point"] = {at::kInt, {words(rows), groups}};
  return infos;
}

QParams read_input_scale(const Checkpoint& checkpoint, const std::vector<std::string>& names, const QuantSpec& spec) {
  const auto read = [&](const std::string& name) {
    const Tensor stored = checkpoint.tensor(name);
    TORCH_CHECK(stored.numel() == 1, name, ": size is ", stored.sizes(), ", expected one value");
    return stored.to(at::kFloat).reshape({1, 1});
  };
  QParams result;
  for (const std::string& name : names) {
    const Tensor scale = read(name + ".input_scale");
    const Tensor zero_point = spec.symmetric ? Tensor() : read(name + ".input_zero_point");
    if (!result.scale.defined()) {
      result = {scale, zero_point};
      continue;
    }
    TORCH_CHECK(at::equal(result.scale, scale) && (spec.symmetric || at::equal(result.zero_point, zero_point)), name,
                ".input_scale: differs from that of ", names[0],
                ", which reads the same input; one grid for both is supported");
  }
  return result;
}

}  // namespace baseq

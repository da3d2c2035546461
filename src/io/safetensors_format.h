#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <map>
#include <string>
#include <vector>

/// What reading and writing safetensors share. Not installed.
namespace baseq {

struct SafetensorsDType {
  const char* name;
  at::ScalarType type;
};
inline constexpr std::array<SafetensorsDType, 10> kSafetensorsDTypes = {{{"F64", at::kDouble},
                                                                         {"F32", at::kFloat},
                                                                         {"F16", at::kHalf},
                                                                         {"BF16", at::kBFloat16},
                                                                         {"I64", at::kLong},
                                                                         {"I32", at::kInt},
                                                                         {"I16", at::kShort},
                                                                         {"I8", at::kChar},
                                                                         {"U8", at::kByte},
                                                                         {"BOOL", at::kBool}}};
inline constexpr const char* kSafetensorsDTypeNames = "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL";
inline constexpr size_t kSafetensorsLengthBytes = 8;
inline constexpr size_t kMaxSafetensorsHeaderBytes = 100'000'000;  // the limit of the reference implementation
inline constexpr const char* kSafetensorsMetadataKey = "__metadata__";
inline constexpr const char* kSafetensorsWho = "safetensors";

}  // namespace baseq

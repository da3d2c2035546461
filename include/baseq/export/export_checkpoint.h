#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "baseq/formats/export_plan.h"
#include "baseq/model/stored_model.h"

#pragma GCC visibility push(default)
namespace baseq {

struct Recipe;

/// What a checkpoint can be turned into; docs/export.md says what each carries and who loads it.
enum class ExportFormat {
  kHuggingFace,        ///< "hf": dequantized weights, every transform merged
  kCompressedTensors,  ///< "compressed-tensors": pack-quantized, or int-quantized where activations have 8 bits too
  kGptq,               ///< "gptq": version 1 of symmetric weights, version 2 of asymmetric ones
  kAwq,                ///< "awq": 4 bits, version "gemm"
  kPeft,               ///< "peft": as kHuggingFace without the low-rank corrections, which are a LoRA adapter
  kGguf,               ///< "gguf": one file for llama.cpp
};

/// Throws c10::Error listing the formats when `name` is none of them.
ExportFormat export_format(const std::string& name);

/// The names of the formats that carry a Llama model quantized with `recipe`, each with its default options and, of
/// GGUF, a quantized type. Sizes that a format cannot divide are found by plan_export() alone.
std::vector<std::string> export_formats(const Recipe& recipe);

struct ExportOptions {
  ExportFormat format = ExportFormat::kHuggingFace;
  /// What the format keeps in floating point: embedding, head, norms, biases, scales and weights without a grid.
  /// Absent: float16 for gptq and awq, whose scales have it, bfloat16 for the others.
  std::optional<at::ScalarType> dtype = {};
  std::string gguf_type = "Q4_0";  ///< of the linears in a GGUF file: "F16", "Q8_0", "Q4_0" or "Q4_1"
  /// Of embedding and head in a GGUF file: "F16" or "Q8_0". Absent: F16 with linears of type F16, else Q8_0.
  std::optional<std::string> gguf_head_type = {};
};

/// The preflight of an export:
///
///     const StoredModel model = open_model("out");
///     const ExportPlan plan = plan_export(model, {.format = ExportFormat::kGguf, .gguf_type = "Q4_0"});
///     for (const std::string& note : plan.notes) std::puts(note.c_str());
///     write_export(model.tensors, plan, "out.gguf");
///
/// Reads headers, and of the tensors only the small ones that decide.
/// Throws c10::Error with one sentence saying everything in the checkpoint that the format cannot carry and which
/// recipe would fit, or what of it would be lost.
ExportPlan plan_export(const StoredModel& model, const ExportOptions& options);

/// Throws what write_export would throw of `output` before it begins, and changes nothing: the output exists and may
/// not be replaced, it is the source or in its way, another process writes to it, its disk has no room.
void check_export_place(const Checkpoint& checkpoint, const ExportPlan& plan, const std::filesystem::path& output,
                        const CheckpointWriter::Options& options);

/// Writes what `plan` says and copies the side files of `checkpoint`, see SideFiles. Holds one block of the source.
/// Before the directory gets its name everything is read back, dequantized and compared with the source: a difference
/// is an error.
/// @param progress  called with tensors done and tensors in all, with both equal while they are read back; what it
/// throws
///                  ends the export and leaves nothing behind. May be empty
void write_export(const Checkpoint& checkpoint, const ExportPlan& plan, const std::filesystem::path& output,
                  const CheckpointWriter::Options& options = {},
                  const std::function<void(int64_t done, int64_t total)>& progress = {});

}  // namespace baseq
#pragma GCC visibility pop

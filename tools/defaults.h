#pragma once

#include <filesystem>
#include <string>

namespace baseq::cli {

/// What `quantize` takes without --recipe: rotated weights of 4 bits in groups of 64. Every transform is merged and the
/// scales are float16, so that every format of `export` carries the result, compressed-tensors with --dtype float16.
inline constexpr const char* kDefaultRecipe = "w4-gptq";
/// Texts that are installed with the program, see installed_file().
inline constexpr const char* kCalibrationText = "calibration.txt";
inline constexpr const char* kEvaluationText = "wikitext2-test.txt";

/// A file of share/baseq, beside the program or beside its folder: a prefix may be moved.
/// Throws c10::Error naming the places when it is in neither.
std::filesystem::path installed_file(const std::string& name);

/// The output of `quantize` without --output, in the current directory: the names of model and recipe.
std::string default_output(const std::string& model, const std::string& recipe);

}  // namespace baseq::cli

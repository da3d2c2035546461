#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "baseq/io/checkpoint.h"
#include "io/side_files.h"

namespace baseq {

inline constexpr const char* kCardFile = "README.md";
/// Between these lines of a card is what was measured of the model; nothing at first.
inline constexpr const char* kMeasuredBegin = "<!-- measured by baseq -->\n";
inline constexpr const char* kMeasuredEnd = "<!-- end of what was measured -->\n";

/// The README.md of a checkpoint that was made from another one, with the metadata that the Hugging Face Hub reads.
/// It names neither the directory nor a time: the same model has the same bytes wherever it lies.
struct ModelCard {
  std::string source;                                      ///< what it was made from, see model_name()
  std::string base_model;                                  ///< the same on the Hub, "org/name"; empty: unknown
  std::string title;                                       ///< "quantized with the recipe w4-gptq"
  std::vector<std::string> tags;                           ///< besides "baseq" and those of the source
  std::vector<std::pair<std::string, std::string>> facts;  ///< rows of a table
  std::string sections;                                    ///< Markdown: how to run it, how it was made
};

/// "org/name" of a checkpoint in a cache of the Hub, or as its config.json names it; empty where neither says.
std::string name_on_hub(const Checkpoint& checkpoint);

/// The text of README.md: the card, and below it the source's own. Of the source's metadata the results (`model-index`)
/// and the widget's texts are left out, for they are not about this model; licence, languages, tags and what else there
/// is are taken over.
/// @param source_readme  empty where there is none
std::string card_text(const ModelCard& card, std::string_view source_readme);

/// `readme` with `section` in place of what was measured before. Throws c10::Error where it has no such place.
std::string with_measured(const std::string& readme, const std::string& section);

/// The README.md among `files`; empty where there is none. One that is too long, of more than a MiB, gets no card.
std::string readme_of(const SideFiles& files);
bool has_long_readme(const SideFiles& files);

}  // namespace baseq

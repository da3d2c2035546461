#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

namespace baseq {

/// The files of a checkpoint next to config.json and the weights (tokenizer, chat template, licence, ...), and which of
/// them a checkpoint that is made from it gets. Users load the result with trust_remote_code, so only configuration,
/// tokenizers, templates, text and pictures are copied: no code, no pickles, no weights of other formats, nothing that
/// a link brings in from elsewhere. A link into the directory itself, or into the `blobs` of its model in a Hugging
/// Face cache, is followed.
struct SideFiles {
  struct File {
    std::filesystem::path from;
    std::string name;
    std::string content;  ///< what to write in place of the file's own bytes; empty: those
    int64_t num_bytes = 0;
  };
  std::vector<File> copied;                                  ///< sorted by name
  std::map<std::string, std::vector<std::string>> left_out;  ///< reason -> names of files, or "file: key" within one
  std::vector<std::string> problems;                         ///< links to nothing, each a sentence

  int64_t num_bytes() const;  ///< of all that is copied
  /// One sentence for the user about what is left out; "" for nothing.
  std::string warning() const;
};

/// Reads the directory and the JSON files that are copied. Subdirectories are left out. config.json, *.safetensors and
/// indices of weights are the checkpoint itself, and `except` has names of files that the caller writes or drops: none
/// of them is mentioned.
/// @param config what config.json holds; the keys are mentioned that remove_code_references takes from it
SideFiles find_side_files(const std::filesystem::path& directory, const nlohmann::json& config = {},
                          const std::set<std::string>& except = {});

/// Removes what makes transformers run code that a repository or a file supplies, at any depth: `auto_map`,
/// `custom_pipelines`, and attention or expert implementations that name a repository. Returns the keys it removed.
std::vector<std::string> remove_code_references(nlohmann::json& config);

}  // namespace baseq

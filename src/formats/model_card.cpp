#include "formats/model_card.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <set>

#include "baseq/version.h"
#include "io/files.h"
#include "io/hub_cache.h"

namespace baseq {
namespace {

constexpr int64_t kMaxReadmeBytes = 1 << 20;
constexpr size_t kMaxTags = 100;
constexpr const char* kTag = "baseq";
constexpr std::string_view kFence = "---";
/// Keys of the metadata that a card has itself, and those that are about the source alone.
constexpr std::string_view kOwnKeys[] = {"base_model", "base_model_relation", "library_name",
                                         "tags",       "model-index",         "widget"};

/// A text with YAML between two lines "---" at its start, read no further than to its keys.
struct Readme {
  std::vector<std::pair<std::string, std::string>> metadata;  ///< key -> its lines
  std::string_view body;
};

std::string_view take_line(std::string_view& text) {
  const size_t end = text.find('\n');
  const std::string_view line = text.substr(0, end);
  text.remove_prefix(end == text.npos ? text.size() : end + 1);
  return line.ends_with('\r') ? line.substr(0, line.size() - 1) : line;
}

/// "license" of "license: mit"; empty for a line that continues the value of a key.
std::string_view key_of(std::string_view line) {
  const size_t length = static_cast<size_t>(
      std::ranges::find_if_not(line, [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '-'; }) -
      line.begin());
  const bool is_key = length > 0 && length < line.size() && line[length] == ':' && !line.starts_with('-');
  return is_key ? line.substr(0, length) : std::string_view();
}

Readme parse_readme(std::string_view text) {
  Readme readme{.metadata = {}, .body = text};
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  if (take_line(text) != kFence) return readme;
  std::vector<std::pair<std::string, std::string>> metadata;
  while (!text.empty()) {
    const std::string_view line = take_line(text);
    if (line == kFence) return {std::move(metadata), text};
    if (const std::string_view key = key_of(line); !key.empty()) metadata.emplace_back(key, "");
    if (!metadata.empty()) metadata.back().second += std::string(line) + "\n";
  }
  return readme;  // the first line was a ruler
}

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view kAround = " \t\"'";
  const size_t begin = text.find_first_not_of(kAround);
  return begin == text.npos ? "" : text.substr(begin, text.find_last_not_of(kAround) - begin + 1);
}

/// The items of "tags:\n- a\n- b" or "tags: [a, b]".
std::vector<std::string> items_of(std::string_view lines) {
  std::vector<std::string> items;
  const auto add = [&](std::string_view item) {
    if (!trimmed(item).empty()) items.emplace_back(trimmed(item));
  };
  const std::string_view first = take_line(lines);
  const size_t open = first.find('['), close = first.rfind(']');
  if (open != first.npos && close != first.npos && open < close) {
    std::string_view list = first.substr(open + 1, close - open - 1);
    for (size_t comma = 0; comma != list.npos;) {
      comma = list.find(',');
      add(list.substr(0, comma));
      if (comma != list.npos) list.remove_prefix(comma + 1);
    }
  }
  while (!lines.empty()) {
    std::string_view line = take_line(lines);
    const size_t dash = line.find_first_not_of(' ');
    if (dash != line.npos && line[dash] == '-') add(line.substr(dash + 1));
  }
  return items;
}

bool is_name_on_hub(const std::string& name) {
  const auto plain = [](unsigned char c) { return std::isalnum(c) || c == '-' || c == '_' || c == '.'; };
  const size_t slash = name.find('/');
  return slash != name.npos && slash > 0 && slash + 1 < name.size() && name[0] != '.' &&
         std::ranges::all_of(name.substr(0, slash), plain) && std::ranges::all_of(name.substr(slash + 1), plain);
}

std::string metadata_text(const ModelCard& card, const Readme& source) {
  std::vector<std::string> tags{kTag};
  tags.insert(tags.end(), card.tags.begin(), card.tags.end());
  std::string base = card.base_model.empty() ? "" : fmt::format("base_model: {}\n", card.base_model), others;
  std::vector<std::string> source_tags;
  std::string source_base;
  for (const auto& [key, lines] : source.metadata) {
    if (key == "tags") source_tags = items_of(lines);
    if (key == "base_model") source_base = lines;
    if (std::ranges::find(kOwnKeys, key) == std::end(kOwnKeys)) others += lines;
  }
  // What baseq made has a base model; that of an original one is not ours.
  const bool made_by_us = std::ranges::find(source_tags, kTag) != source_tags.end();
  if (base.empty() && made_by_us) base = source_base;
  if (!base.empty()) base += "base_model_relation: quantized\n";
  for (const std::string& tag : source_tags) {
    if (tags.size() < kMaxTags && std::ranges::find(tags, tag) == tags.end()) tags.push_back(tag);
  }
  std::string text = base + others + "library_name: transformers\ntags:\n";
  for (const std::string& tag : tags) text += fmt::format("- {}\n", tag);
  return text;
}

}  // namespace

std::string name_on_hub(const Checkpoint& checkpoint) {
  const std::string cached = model_name(checkpoint.path());
  if (is_name_on_hub(cached)) return cached;
  const nlohmann::json& config = checkpoint.config();
  const auto said = config.find("_name_or_path");
  if (said == config.end() || !said->is_string()) return "";
  const auto name = said->get<std::string>();
  return is_name_on_hub(name) ? name : "";
}

std::string card_text(const ModelCard& card, std::string_view source_readme) {
  const Readme source = parse_readme(source_readme);
  std::string text =
      fmt::format("{0}\n{1}{0}\n\n# {2}, {3}\n\n", kFence, metadata_text(card, source), card.source, card.title);
  text += fmt::format("Made with baseq {} from {}.\n\n| | |\n|---|---|\n", version(),
                      card.base_model.empty() ? card.source : card.base_model);
  for (const auto& [what, value] : card.facts) text += fmt::format("| {} | {} |\n", what, value);
  text += fmt::format("\n{}{}\n{}", kMeasuredBegin, kMeasuredEnd, card.sections);
  if (source.body.find_first_not_of(" \t\r\n") == source.body.npos) return text;
  return text + "\n---\n\nThe model card of " + card.source + ":\n\n" + std::string(source.body);
}

std::string with_measured(const std::string& readme, const std::string& section) {
  const size_t begin = readme.find(kMeasuredBegin), end = readme.find(kMeasuredEnd);
  TORCH_CHECK(begin != readme.npos && end != readme.npos && begin < end, kCardFile, ": has no lines \"",
              std::string_view(kMeasuredBegin).substr(0, std::string_view(kMeasuredBegin).size() - 1), "\" and \"",
              std::string_view(kMeasuredEnd).substr(0, std::string_view(kMeasuredEnd).size() - 1),
              "\", between which results belong; baseq writes them into the cards of what it quantizes and exports");
  return readme.substr(0, begin) + kMeasuredBegin + section + readme.substr(end);
}

std::string readme_of(const SideFiles& files) {
  constexpr size_t kMaxBytes = size_t{64} << 20;
  const auto file = std::ranges::find(files.copied, kCardFile, &SideFiles::File::name);
  return file == files.copied.end() ? "" : read_file("model card", file->from, kMaxBytes);
}

bool has_long_readme(const SideFiles& files) {
  return std::ranges::any_of(files.copied, [](const SideFiles::File& file) {
    return file.name == kCardFile && file.num_bytes > kMaxReadmeBytes;
  });
}

}  // namespace baseq

#include "tokenizer_json_steps.h"

#include <c10/util/Exception.h>

#include <string>
#include <utility>

namespace baseq {
namespace {

using nlohmann::json;

// Known files have up to ten. Each regular expression holds a table of a megabyte.
constexpr int kMaxSteps = 64;
// Known files have up to 1200 in all. The time that translating an expression to machine code takes grows with the
// square of its length: a tenth of a second for this many.
constexpr size_t kMaxPatternBytes = 4096;
// Known files have up to two.
constexpr size_t kMaxTemplateIds = 1024;

// Calls `on_step` with the component `key` of the file or, if it is a Sequence, with each of its steps.
template <class Fn>
void for_each_step(const JsonComponent& step, const std::string& list, StepReading& reading, const Fn& on_step) {
  TORCH_CHECK(++reading.num_steps <= kMaxSteps, step.place(), " is step ", reading.num_steps,
              " of the file, Sequences included; at most ", kMaxSteps, " are supported");
  if (step.string("type") != "Sequence") return on_step(step);
  reading.unsupported.other_keys(step, {"type", list});
  step.for_each_object(list, [&](const JsonComponent& inner) { for_each_step(inner, list, reading, on_step); });
}
template <class Fn>
void for_each_step(const JsonComponent& root, const std::string& key, const std::string& list, StepReading& reading,
                   const Fn& on_step) {
  if (!root.get(key).is_null()) for_each_step(root.object(key), list, reading, on_step);
}

Pattern read_pattern(const JsonComponent& step, StepReading& reading) {
  Unsupported& unsupported = reading.unsupported;
  const JsonComponent pattern = step.object("pattern");
  Pattern result;
  if (pattern.value().contains("Regex")) {
    unsupported.other_keys(pattern, {"Regex"});
    const std::string regex = pattern.string("Regex");
    reading.pattern_bytes += regex.size();
    TORCH_CHECK(reading.pattern_bytes <= kMaxPatternBytes, pattern.place(),
                ": the regular expressions of the file have ", reading.pattern_bytes, " bytes up to this one; at most ",
                kMaxPatternBytes, " are supported");
    try {
      result.regex.emplace(regex);
    } catch (const c10::Error& error) {
      unsupported.add(pattern.place() + ": " + error.what_without_backtrace());
    }
  } else {
    unsupported.other_keys(pattern, {"String"});
    result.literal = pattern.string("String");
    unsupported.unless(!result.literal.empty(), pattern, "String");
  }
  return result;
}

void add_unknown(const JsonComponent& step, Unsupported& unsupported) {
  unsupported.add(step.place() + " " + step.string("type"));
}

pre_tokenizers::Metaspace::PrependScheme read_prepend_scheme(const JsonComponent& step) {
  using PrependScheme = pre_tokenizers::Metaspace::PrependScheme;
  auto scheme = PrependScheme::kAlways;
  if (!step.get("prepend_scheme").is_null()) {
    scheme = static_cast<PrependScheme>(step.choice("prepend_scheme", {"first", "always", "never"}));
  }
  if (!step.get("add_prefix_space").is_null()) {
    TORCH_CHECK(step.boolean("add_prefix_space") || scheme == PrependScheme::kNever, step.place_of("add_prefix_space"),
                " is false but prepend_scheme is not \"never\"");
  }
  return scheme;
}

// What a ByteLevel does as a decoder or post-processor depends on no option.
void check_byte_level(const JsonComponent& step, Unsupported& unsupported) {
  unsupported.other_keys(step, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
}

void read_template(const JsonComponent& step, PostProcessing& result, Unsupported& unsupported) {
  unsupported.other_keys(step, {"type", "single", "pair", "special_tokens"});
  const JsonComponent special_tokens = step.object("special_tokens");
  int num_sequences = 0;
  step.for_each_object("single", [&](const JsonComponent& piece) {
    if (piece.value().contains("Sequence")) {
      unsupported.unless(piece.object("Sequence").string("id") == "A", piece, "Sequence");
      ++num_sequences;
      return;
    }
    const JsonComponent token = special_tokens.object(piece.object("SpecialToken").string("id"));
    auto& ids = num_sequences > 0 ? result.after : result.before;
    const json& values = token.array("ids");
    TORCH_CHECK(ids.size() + values.size() <= kMaxTemplateIds, piece.place(), ": the template adds ",
                ids.size() + values.size(), " ids on one side of a text; at most ", kMaxTemplateIds, " are supported");
    for (size_t i = 0; i < values.size(); ++i) {
      ids.push_back(read_token_id(values[i], token.place_of("ids") + "[" + std::to_string(i) + "]"));
    }
  });
  unsupported.unless(num_sequences == 1, step, "single");
}

}  // namespace

std::vector<Normalizer> read_normalizer(const JsonComponent& root, StepReading& reading) {
  Unsupported& unsupported = reading.unsupported;
  std::vector<Normalizer> steps;
  for_each_step(root, "normalizer", "normalizers", reading, [&](const JsonComponent& step) {
    const std::string type = step.string("type");
    if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
      unsupported.other_keys(step, {"type"});
      const bool composed = type.back() == 'C';
      const auto form = type.size() == 3 ? (composed ? NormalizationForm::kNfc : NormalizationForm::kNfd)
                                         : (composed ? NormalizationForm::kNfkc : NormalizationForm::kNfkd);
      steps.emplace_back(form);
    } else if (type == "Prepend") {
      unsupported.other_keys(step, {"type", "prepend"});
      steps.emplace_back(normalizers::Prepend{step.string("prepend")});
      unsupported.unless(!step.string("prepend").empty(), step, "prepend");
    } else if (type == "Replace") {
      unsupported.other_keys(step, {"type", "pattern", "content"});
      steps.emplace_back(normalizers::Replace{read_pattern(step, reading), step.string("content")});
    } else if (type == "Lowercase") {
      unsupported.other_keys(step, {"type"});
      steps.emplace_back(normalizers::Lowercase{});
    } else if (type == "Strip") {
      unsupported.other_keys(step, {"type", "strip_left", "strip_right"});
      steps.emplace_back(normalizers::Strip{step.boolean("strip_left"), step.boolean("strip_right")});
    } else {
      add_unknown(step, unsupported);
    }
  });
  return steps;
}

std::vector<PreTokenizer> read_pre_tokenizer(const JsonComponent& root, StepReading& reading) {
  Unsupported& unsupported = reading.unsupported;
  std::vector<PreTokenizer> steps;
  const auto add = [&](const JsonComponent& step) {
    const std::string type = step.string("type");
    if (!steps.empty() && std::holds_alternative<pre_tokenizers::ByteLevel>(steps.back())) {
      unsupported.add(step.place() + " " + type + " after ByteLevel");
    } else if (type == "Digits") {
      unsupported.other_keys(step, {"type", "individual_digits"});
      steps.emplace_back(pre_tokenizers::Digits{step.boolean("individual_digits")});
    } else if (type == "ByteLevel") {
      unsupported.other_keys(step, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
      const bool use_regex = step.get("use_regex").is_null() || step.boolean("use_regex");
      steps.emplace_back(pre_tokenizers::ByteLevel{step.boolean("add_prefix_space"), use_regex});
    } else if (type == "Metaspace") {
      unsupported.other_keys(step, {"type", "replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
      std::string replacement;
      append_utf8(step.character("replacement"), replacement);
      const bool split = step.get("split").is_null() || step.boolean("split");
      steps.emplace_back(pre_tokenizers::Metaspace{std::move(replacement), read_prepend_scheme(step), split});
    } else if (type == "Split") {
      unsupported.other_keys(step, {"type", "pattern", "behavior", "invert"});
      const size_t behavior =
          step.choice("behavior", {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"});
      steps.emplace_back(pre_tokenizers::Split{
          read_pattern(step, reading), static_cast<pre_tokenizers::Split::Behavior>(behavior), step.boolean("invert")});
    } else {
      add_unknown(step, unsupported);
    }
  };
  for_each_step(root, "pre_tokenizer", "pretokenizers", reading, add);
  return steps;
}

PostProcessing read_post_processor(const JsonComponent& root, StepReading& reading) {
  Unsupported& unsupported = reading.unsupported;
  PostProcessing result;
  int num_templates = 0;
  for_each_step(root, "post_processor", "processors", reading, [&](const JsonComponent& step) {
    const std::string type = step.string("type");
    if (type == "ByteLevel") {
      check_byte_level(step, unsupported);  // it moves offsets only
    } else if (type == "TemplateProcessing" && ++num_templates == 1) {
      read_template(step, result, unsupported);
    } else {
      add_unknown(step, unsupported);
    }
  });
  return result;
}

std::vector<Decoder> read_decoder(const JsonComponent& root, StepReading& reading) {
  Unsupported& unsupported = reading.unsupported;
  std::vector<Decoder> steps;
  for_each_step(root, "decoder", "decoders", reading, [&](const JsonComponent& step) {
    const std::string type = step.string("type");
    if (type == "ByteLevel") {
      check_byte_level(step, unsupported);
      steps.emplace_back(decoders::ByteLevel{});
    } else if (type == "ByteFallback") {
      unsupported.other_keys(step, {"type"});
      steps.emplace_back(decoders::ByteFallback{});
    } else if (type == "Fuse") {
      unsupported.other_keys(step, {"type"});
      steps.emplace_back(decoders::Fuse{});
    } else if (type == "Strip") {
      unsupported.other_keys(step, {"type", "content", "start", "stop"});
      steps.emplace_back(decoders::Strip{step.character("content"), step.count("start"), step.count("stop")});
    } else if (type == "Replace") {
      unsupported.other_keys(step, {"type", "pattern", "content"});
      steps.emplace_back(decoders::Replace{read_pattern(step, reading), step.string("content")});
    } else if (type == "Metaspace") {
      unsupported.other_keys(step, {"type", "replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
      const bool prepended = read_prepend_scheme(step) != pre_tokenizers::Metaspace::PrependScheme::kNever;
      steps.emplace_back(decoders::Metaspace{step.character("replacement"), prepended});
    } else {
      add_unknown(step, unsupported);
    }
  });
  return steps;
}

}  // namespace baseq

#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "baseq/formats/open_model.h"
#include "baseq/io/checkpoint.h"
#include "baseq/model/config.h"
#include "baseq/pipeline/recipe.h"
#include "baseq/runtime/chat_template.h"
#include "baseq/tokenizer/token_windows.h"
#include "baseq/tokenizer/tokenizer.h"
#include "formats/compressed_tensors/config.h"
#include "formats/gptq/read.h"
#include "formats/native/config.h"
#include "io/json_object.h"
#include "model/quantized_linear.h"
#include "pipeline/calibration_documents.h"
#include "pipeline/run_log.h"

/// What is done with a file nobody vouches for, one function a format: it is read or refused with a c10::Error;
/// anything else is a finding. libFuzzer (fuzz_main.cpp) and the tests (fuzz_test.cpp) call the same functions.
namespace baseq::fuzz {

/// `bytes` in a file that is there until the next call.
inline std::filesystem::path file_of(std::string_view bytes, const char* ending) {
  static const std::filesystem::path stem =
      std::filesystem::temp_directory_path() / ("baseq_fuzz_" + std::to_string(::getpid()));
  const std::filesystem::path path = stem.string() + ending;
  // A new file: a mapping of the last one stays whole.
  std::filesystem::remove(path);
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  return path;
}

inline void safetensors(std::string_view bytes) {
  const SafetensorsFile file(file_of(bytes, ".safetensors"));
  for (const std::string& name : file.names()) file.tensor(name).clone();
}

inline void tokenizer(std::string_view bytes) {
  const Tokenizer tokenizer(file_of(bytes, ".json"));
  std::vector<int32_t> ids = tokenizer.encode("The quick \u00e9 brown\n\n fox's 12345 \U0001f600 <s>");
  tokenizer.decode(ids);
}

inline void config(std::string_view bytes) {
  const std::string path = file_of(bytes, ".json").string();
  const nlohmann::json json = read_json_file(path);
  ModelConfig::from_json(json, path);
  if (json.contains("quantization_config")) quantization_config_from_json(json["quantization_config"], path);
}

inline void recipe(std::string_view bytes) {
  const std::string path = file_of(bytes, ".json").string();
  const Recipe recipe = Recipe::from_json(read_json_file(path), path);
  // What was accepted can be written, and is read as what it was.
  const nlohmann::json resolved = recipe.to_json();
  TORCH_INTERNAL_ASSERT(Recipe::from_json(resolved, path).to_json() == resolved);
  recipe.quantization_config();
  recipe.grids.in_block(0);
}

inline void calibration(std::string_view bytes) {
  static const Tokenizer tokenizer(std::filesystem::path(BASEQ_TEST_DATA) / "tokenizer" / "tokenizer.json");
  static const ChatTemplate chat({.path = "model", .jinja = "{{ '<|im_start|>' + role + '<|im_end|>\n' }}"});
  for (const CalibrationDocument& document : read_documents(file_of(bytes, ".jsonl"))) {
    if (document.messages.empty()) {
      tokenizer.encode(document.text);
    } else {
      chat.encode(tokenizer, document.messages);
    }
  }
  tokenize_file(file_of(bytes, ".jsonl"), tokenizer);
}

inline void run_log(std::string_view bytes) {
  const RunRecord record = read_run_log(file_of(bytes, ".log"));
  record.seconds();
  record.peak_memory_bytes();
}

inline void gguf(std::string_view bytes) {
  const std::filesystem::path path = file_of(bytes, ".gguf");
  const Checkpoint checkpoint = open_model(path).tensors;
  for (const std::string& name : checkpoint.names()) checkpoint.tensor(name).clone();
  open_tokenizer(path);
}

inline void compressed_tensors(std::string_view bytes) {
  const std::string path = file_of(bytes, ".json").string();
  const CompressedTensorsConfig config(read_json_file(path), path, /*num_modules=*/1000);
  for (const char* module : {"model.layers.0.self_attn.q_proj", "model.layers.17.mlp.down_proj", "lm_head"}) {
    config.format_of(module);
  }
}

/// One block of 8 features, 2 heads and a head of keys.
inline nlohmann::json tiny_config() {
  return {{"architectures", {"LlamaForCausalLM"}},
          {"hidden_size", 8},
          {"intermediate_size", 12},
          {"num_attention_heads", 2},
          {"num_key_value_heads", 1},
          {"num_hidden_layers", 1},
          {"vocab_size", 4}};
}

/// The tensors of a file as a checkpoint with this config.json.
inline Checkpoint checkpoint_of(const std::shared_ptr<const SafetensorsFile>& file, nlohmann::json config) {
  Checkpoint::MadeTensors tensors;
  for (const std::string& name : file->names()) {
    tensors[name] = {file->info(name), [file, name] { return file->tensor(name); }};
  }
  return {"packed", std::move(config), std::move(tensors), 0};
}

/// A model of GPTQ or AWQ with one block; the file's metadata hold its quantization_config as text.
inline void gptq(std::string_view bytes) {
  const auto file = std::make_shared<const SafetensorsFile>(file_of(bytes, ".safetensors"));
  const auto text = file->metadata().find("quantization_config");
  nlohmann::json config = tiny_config();
  config["quantization_config"] =
      nlohmann::json::parse(text == file->metadata().end() ? "" : text->second, nullptr, /*allow_exceptions=*/false);
  const Checkpoint checkpoint = checkpoint_of(file, config);
  if (!is_gptq_or_awq(checkpoint)) return;
  const StoredModel model = read_gptq(checkpoint);
  for (const auto& [name, format] : model.linears) {
    if (format.weights) read_quantized_weight(model.tensors, name, format);
  }
}

/// A linear "m" in the format that digits among the file's metadata name.
inline void packed(std::string_view bytes) {
  const auto file = std::make_shared<const SafetensorsFile>(file_of(bytes, ".safetensors"));
  const auto digit = [&](const char* key) {
    const auto it = file->metadata().find(key);
    const char c = it == file->metadata().end() || it->second.empty() ? '0' : it->second[0];
    return c >= '0' && c <= '9' ? c - '0' : 0;
  };
  const LinearFormat format{.weights = QuantSpec{.num_bits = 2 + digit("bits") % 7,
                                                 .symmetric = digit("asymmetric") == 0,
                                                 .strategy = static_cast<Strategy>(digit("strategy") % 3),
                                                 .group_size = 4 * (1 + digit("groups"))},
                            .codes = static_cast<LinearFormat::Codes>(digit("codes") % 3),
                            .group_index = digit("index") != 0};
  read_quantized_weight(checkpoint_of(file, nlohmann::json::object()), "m", format);
}

/// A native checkpoint with one block, and its online transforms; the file's metadata may hold a quantization_config.
inline void native(std::string_view bytes) {
  const auto file = std::make_shared<const SafetensorsFile>(file_of(bytes, ".safetensors"));
  nlohmann::json config = tiny_config();
  const auto text = file->metadata().find("quantization_config");
  config["quantization_config"] = text == file->metadata().end()
                                      ? to_json(QuantizationConfig{})
                                      : nlohmann::json::parse(text->second, nullptr, /*allow_exceptions=*/false);
  const StoredModel model(checkpoint_of(file, config));
  for (const auto& [place, stored] : model.online) {
    const Transform transform = stored.read();
    apply_inverse_transpose(transform, apply_transform(transform, at::ones({2, transform[0].size()})));
  }
}

/// A chat template; one that is recognized writes a conversation.
inline void chat_template(std::string_view bytes) {
  const ChatTemplate chat({.path = "model", .jinja = std::string(bytes), .bos_token = "<s>", .eos_token = "</s>"});
  const std::vector<Message> messages{
      {"system", "s"}, {"user", " a\n"}, {"assistant", "<think>\n</think>b"}, {"user", "c"}};
  chat.render(messages);
  chat.render(std::span(messages).first(3));
}

struct Target {
  const char* name;  ///< of its folder in seeds/
  void (*run)(std::string_view);
};
inline constexpr Target kTargets[] = {{"safetensors", safetensors},
                                      {"tokenizer", tokenizer},
                                      {"config", config},
                                      {"recipe", recipe},
                                      {"calibration", calibration},
                                      {"run_log", run_log},
                                      {"gguf", gguf},
                                      {"compressed_tensors", compressed_tensors},
                                      {"gptq", gptq},
                                      {"packed", packed},
                                      {"native", native},
                                      {"chat_template", chat_template}};

/// Runs the target; a refusal is fine. An assertion that failed is one of ours and no refusal.
inline void run(const Target& target, std::string_view bytes) {
  constexpr std::string_view kAssertion = "INTERNAL ASSERT";
  // A message may quote the file.
  if (bytes.find(kAssertion) != std::string_view::npos) return;
  try {
    target.run(bytes);
  } catch (const c10::Error& error) {
    if (std::string_view(error.what_without_backtrace()).find(kAssertion) != std::string_view::npos) throw;
  }
}

}  // namespace baseq::fuzz

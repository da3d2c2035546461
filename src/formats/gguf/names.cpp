#include "formats/gguf/names.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>

#include "baseq/model/site.h"

namespace baseq {
namespace {

constexpr GgufArchitecture kArchitectures[] = {{"LlamaForCausalLM", "llama", "llama", true},
                                               {"MistralForCausalLM", "mistral", "llama", true},
                                               {"Qwen2ForCausalLM", "qwen2", "qwen2", false},
                                               {"Qwen3ForCausalLM", "qwen3", "qwen3", false}};

enum Program : size_t { kHuggingFace, kLlamaCpp };
using Names = std::array<std::string_view, 2>;  ///< by Program

constexpr Names kBlocks = {"model.layers.", "blk."};
constexpr Names kAround[] = {
    {"model.embed_tokens", "token_embd"}, {"model.norm", "output_norm"}, {"lm_head", "output"}};
constexpr Names kInBlock[] = {{"input_layernorm", "attn_norm"},    {"post_attention_layernorm", "ffn_norm"},
                              {"self_attn.q_norm", "attn_q_norm"}, {"self_attn.k_norm", "attn_k_norm"},
                              {"self_attn.q_proj", "attn_q"},      {"self_attn.k_proj", "attn_k"},
                              {"self_attn.v_proj", "attn_v"},      {"self_attn.o_proj", "attn_output"},
                              {"mlp.gate_proj", "ffn_gate"},       {"mlp.up_proj", "ffn_up"},
                              {"mlp.down_proj", "ffn_down"}};

std::string translated(std::string_view name, Program from, Program to) {
  std::string block;
  if (name.starts_with(kBlocks[from])) {
    const size_t number = kBlocks[from].size(), end = name.find('.', number);
    if (end == name.npos) return "";
    block = std::string(kBlocks[to]) + std::string(name.substr(number, end + 1 - number));
    name.remove_prefix(end + 1);
  }
  const size_t dot = name.rfind('.');
  if (dot == name.npos) return "";
  const auto find_in = [&](const auto& table) -> std::string {
    for (const Names& names : table) {
      if (names[from] == name.substr(0, dot)) return block + std::string(names[to]) + std::string(name.substr(dot));
    }
    return "";
  };
  return block.empty() ? find_in(kAround) : find_in(kInBlock);
}

const GgufArchitecture* find_architecture(std::string_view GgufArchitecture::*member, std::string_view name) {
  const auto* it = std::find_if(std::begin(kArchitectures), std::end(kArchitectures),
                                [&](const GgufArchitecture& known) { return known.*member == name; });
  return it == std::end(kArchitectures) ? nullptr : it;
}

}  // namespace

const GgufArchitecture* gguf_architecture(const ModelConfig& config) {
  return find_architecture(&GgufArchitecture::architecture, config.architecture);
}

const GgufArchitecture* gguf_architecture_named(std::string_view name) {
  return find_architecture(&GgufArchitecture::name, name);
}

std::string gguf_name(std::string_view hugging_face) { return translated(hugging_face, kHuggingFace, kLlamaCpp); }
std::string hugging_face_name(std::string_view gguf) { return translated(gguf, kLlamaCpp, kHuggingFace); }

int64_t permuted_heads(const GgufArchitecture& architecture, std::string_view linear, int64_t query_heads,
                       int64_t key_heads) {
  const auto turned = site_info(Site::kQueryKey).writers;
  if (!architecture.permuted || std::find(turned.begin(), turned.end(), linear) == turned.end()) return 0;
  return linear == turned[0] ? query_heads : key_heads;
}

Tensor permute_rows(const Tensor& rows, int64_t heads) {
  if (heads == 0) return rows;
  return rows.reshape({heads, 2, rows.size(0) / heads / 2, -1}).transpose(1, 2).reshape(rows.sizes());
}

Tensor unpermute_rows(const Tensor& rows, int64_t heads) {
  if (heads == 0) return rows;
  TORCH_CHECK(rows.size(0) % (2 * heads) == 0, "gguf: ", rows.size(0), " rows of q or k are not pairs of features of ",
              heads, " heads");
  return rows.reshape({heads, rows.size(0) / heads / 2, 2, -1}).transpose(1, 2).reshape(rows.sizes());
}

}  // namespace baseq

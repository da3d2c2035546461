#include "baseq/model/open_checkpoint.h"

#include "gguf_checkpoint.h"
#include "gguf_tokenizer_json.h"
#include "gptq_checkpoint.h"

namespace baseq {

Checkpoint open_checkpoint(const std::filesystem::path& path) {
  std::error_code error;
  if (std::filesystem::is_regular_file(path, error)) return gguf_checkpoint(path);
  auto checkpoint = std::make_shared<const Checkpoint>(path);
  return is_gptq_or_awq(*checkpoint) ? gptq_checkpoint(std::move(checkpoint)) : *checkpoint;
}

Tokenizer open_tokenizer(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return Tokenizer(path / "tokenizer.json");
  const GgufFile file(path);
  return Tokenizer(gguf_tokenizer_json(file), file.name());
}

}  // namespace baseq

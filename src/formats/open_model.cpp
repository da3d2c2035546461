#include "baseq/formats/open_model.h"

#include "formats/compressed_tensors/read.h"
#include "formats/gguf/read.h"
#include "formats/gguf/tokenizer.h"
#include "formats/gptq/read.h"

namespace baseq {

StoredModel open_model(const std::filesystem::path& path) {
  std::error_code error;
  if (std::filesystem::is_regular_file(path, error)) return read_gguf(path);
  Checkpoint checkpoint(path);
  if (is_gptq_or_awq(checkpoint)) return read_gptq(checkpoint);
  if (is_compressed_tensors(checkpoint)) return read_compressed_tensors(std::move(checkpoint));
  return checkpoint;
}

Tokenizer open_tokenizer(const std::filesystem::path& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return Tokenizer(path / "tokenizer.json");
  if (!is_gguf(path)) return Tokenizer(path);
  const GgufFile file(path);
  return Tokenizer(gguf_tokenizer_json(file), file.name());
}

}  // namespace baseq

// Encodes and decodes many texts, for the comparison with other implementations in tests/python.
//
//   baseq_tokenizer_records TOKENIZER.JSON INPUT OUTPUT
//
// INPUT holds records: the number of bytes as int32 of this machine's byte order, then the bytes. For each OUTPUT gets
// the number of ids, the ids, the number of bytes of the decoded text and these; or, for a text that is refused, -1 and
// the message in the same way.

#include <c10/util/Exception.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "baseq/tokenizer/tokenizer.h"

namespace {

void write_int(std::ofstream& out, int32_t value) { out.write(reinterpret_cast<const char*>(&value), sizeof(value)); }

void write_text(std::ofstream& out, std::string_view text) {
  write_int(out, static_cast<int32_t>(text.size()));
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
}

void write_record(std::ofstream& out, const baseq::Tokenizer& tokenizer, std::string_view text) {
  try {
    const std::vector<int32_t> ids = tokenizer.encode(text);
    const std::string decoded = tokenizer.decode(ids);
    write_int(out, static_cast<int32_t>(ids.size()));
    out.write(reinterpret_cast<const char*>(ids.data()), static_cast<std::streamsize>(ids.size() * sizeof(ids[0])));
    write_text(out, decoded);
  } catch (const c10::Error& error) {
    write_int(out, -1);
    write_text(out, error.what_without_backtrace());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s TOKENIZER.JSON INPUT OUTPUT\n", argv[0]);
    return 2;
  }
  try {
    const baseq::Tokenizer tokenizer(argv[1]);
    std::ifstream in(argv[2], std::ios::binary);
    std::ofstream out(argv[3], std::ios::binary);
    int32_t size = 0;
    for (std::string text; in.read(reinterpret_cast<char*>(&size), sizeof(size));) {
      text.resize(static_cast<size_t>(size));
      in.read(text.data(), size);
      write_record(out, tokenizer, text);
    }
    return out.flush() ? 0 : 1;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return 1;
}

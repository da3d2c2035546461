// Speed of Tokenizer::encode, and its ids for a comparison with other implementations.
//
//   tokenizer_speed TOKENIZER.JSON TEXT [REPETITIONS] [IDS]
//
// TEXT may hold several records with a byte 0xFF between them, which UTF-8 never contains; each is encoded by itself.
// IDS gets all ids as int32 of this machine's byte order, -1 after each record.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "baseq/tokenizer/tokenizer.h"

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::vector<std::string_view> split_records(std::string_view text) {
  std::vector<std::string_view> records;
  size_t begin = 0;
  for (size_t end; (end = text.find('\xFF', begin)) != std::string_view::npos; begin = end + 1) {
    records.push_back(text.substr(begin, end - begin));
  }
  records.push_back(text.substr(begin));
  return records;
}

void measure(const char* tokenizer_json, const char* text_file, int repetitions, const char* ids_file) {
  const double start = seconds();
  const baseq::Tokenizer tokenizer(tokenizer_json);
  std::printf("load: %.3f s, %lld tokens in the vocabulary\n", seconds() - start,
              static_cast<long long>(tokenizer.vocab_size()));

  std::ifstream stream(text_file, std::ios::binary);
  if (!stream) throw std::runtime_error(std::string("cannot open ") + text_file);
  const std::string text{std::istreambuf_iterator<char>(stream), {}};
  const auto records = split_records(text);
  for (int i = 0; i < repetitions; ++i) {
    const double begin = seconds();
    size_t num_ids = 0;
    for (const std::string_view record : records) num_ids += tokenizer.encode(record).size();
    const double elapsed = seconds() - begin;
    std::printf("encode: %.4f s, %.2f MB/s, %zu ids\n", elapsed, static_cast<double>(text.size()) / 1e6 / elapsed,
                num_ids);
  }
  if (ids_file == nullptr) return;
  std::ofstream out(ids_file, std::ios::binary);
  for (const std::string_view record : records) {
    auto ids = tokenizer.encode(record);
    ids.push_back(-1);
    out.write(reinterpret_cast<const char*>(ids.data()), static_cast<std::streamsize>(ids.size() * sizeof(ids[0])));
  }
  if (!out.flush()) throw std::runtime_error(std::string("cannot write ") + ids_file);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3 || argc > 5) {
    std::fprintf(stderr, "usage: %s TOKENIZER.JSON TEXT [REPETITIONS] [IDS]\n", argv[0]);
    return 2;
  }
  try {
    measure(argv[1], argv[2], argc > 3 ? std::atoi(argv[3]) : 5, argc > 4 ? argv[4] : nullptr);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}

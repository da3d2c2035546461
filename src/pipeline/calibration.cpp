#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "baseq/pipeline/job.h"
#include "baseq/tokenizer/token_windows.h"
#include "pipeline/calibration_documents.h"
#include "shuffle.h"
#include "tokenizer/text_files.h"

namespace baseq {
namespace {

using Split = CalibrationData::Split;

/// What is asked of one file.
struct Wanted {
  int64_t num_windows, seq_len;
  uint64_t seed;
};

/// For each window the file that it comes from: the one that lacks most of its share so far.
std::vector<size_t> shares(const std::vector<CalibrationData::File>& files, int64_t num_windows) {
  double total = 0;
  for (const CalibrationData::File& file : files) {
    TORCH_CHECK(file.weight > 0 && std::isfinite(file.weight), file.path.string(), ": its weight is ", file.weight,
                "; expected a positive number");
    total += file.weight;
  }
  std::vector<int64_t> taken(files.size());
  std::vector<size_t> result;
  for (int64_t i = 1; i <= num_windows; ++i) {
    const auto lacks = [&](size_t f) {
      return files[f].weight / total * static_cast<double>(i) - static_cast<double>(taken[f]);
    };
    size_t most = 0;
    for (size_t f = 1; f < files.size(); ++f) {
      if (lacks(f) > lacks(most)) most = f;
    }
    ++taken[most];
    result.push_back(most);
  }
  for (size_t f = 0; f < files.size(); ++f) {
    TORCH_CHECK(taken[f] > 0, files[f].path.string(), ": its weight of ", files[f].weight, " among ", total,
                " gives it none of the ", num_windows, " windows");
  }
  return result;
}

Tensor first_stored_windows(const std::filesystem::path& file, const Tensor& ids, const Wanted& wanted) {
  TORCH_CHECK(ids.size(0) >= wanted.num_windows && ids.size(1) >= wanted.seq_len, file.string(), ": holds ",
              ids.size(0), " windows of ", ids.size(1), " tokens but the recipe asks for ", wanted.num_windows, " of ",
              wanted.seq_len);
  return ids.narrow(0, 0, wanted.num_windows).narrow(1, 0, wanted.seq_len);
}

Tensor windows_of_ids(const std::filesystem::path& file, const Wanted& wanted, CalibrationRead& read) {
  const Tensor ids = stored_ids(file);
  read.tokens = ids.numel();
  if (ids.dim() == 2) return first_stored_windows(file, ids, wanted);
  return draw_windows(ids, wanted.num_windows, wanted.seq_len, wanted.seed, file.string());
}

/// All texts joined by empty lines; lets go of them.
Tensor windows_of_text(std::vector<CalibrationDocument>& documents, DocumentEncoder& encoder, const Wanted& wanted,
                       CalibrationRead& read) {
  std::string text = std::move(documents[0].text);
  for (size_t i = 1; i < documents.size(); ++i) {
    if (!text.empty()) text += "\n\n";
    text += std::exchange(documents[i].text, {});
  }
  const Tensor ids = encode_file_text(read.file, std::exchange(text, {}), encoder.tokenizer());
  read.tokenized = read.documents;
  read.tokens = ids.size(0);
  return draw_windows(ids, wanted.num_windows, wanted.seq_len, wanted.seed, read.file.string());
}

std::vector<size_t> shuffled(size_t size, uint64_t seed) {
  std::vector<size_t> order(size);
  std::iota(order.begin(), order.end(), size_t{0});
  std::mt19937_64 random(seed);
  shuffle(order, random);
  return order;
}

/// Documents in the order of the seed until they fill the windows: one after the other, or of each the first tokens.
Tensor windows_of_documents(const std::vector<CalibrationDocument>& documents, DocumentEncoder& encoder,
                            const Wanted& wanted, Split split, CalibrationRead& read) {
  const size_t length = static_cast<size_t>(wanted.seq_len), needed = static_cast<size_t>(wanted.num_windows) * length;
  std::vector<int32_t> kept;
  for (const size_t index : shuffled(documents.size(), wanted.seed)) {
    if (kept.size() >= needed) break;
    std::string why;
    const std::vector<int32_t> ids = encoder.encode(documents[index], why);
    ++read.tokenized;
    read.tokens += static_cast<int64_t>(ids.size());
    if (why.empty() && split == Split::kSamples && ids.size() < length) {
      why = "has " + std::to_string(ids.size()) + " tokens but a window needs " + std::to_string(length);
    }
    if (!why.empty()) {
      if (read.skipped++ == 0) read.why = documents[index].where + ": " + why;
      continue;
    }
    kept.insert(kept.end(), ids.begin(), split == Split::kSamples ? ids.begin() + wanted.seq_len : ids.end());
  }
  const std::string skipped = read.skipped == 0 ? "" : "; the first that is skipped: " + read.why;
  TORCH_CHECK(kept.size() >= needed, read.file.string(), ": ", read.documents - read.skipped, " of ", read.documents,
              " documents fit, which fill ", kept.size() / length, " windows of ", length, " tokens, but ",
              wanted.num_windows, " are needed", skipped);
  const Tensor windows = at::empty({wanted.num_windows, wanted.seq_len}, at::kInt);
  std::memcpy(windows.mutable_data_ptr<int32_t>(), kept.data(), needed * sizeof(int32_t));
  return windows;
}

Tensor windows_of_file(const std::filesystem::path& file, DocumentEncoder& encoder, const Wanted& wanted, Split split,
                       CalibrationRead& read) {
  if (extension_of(file) == ".safetensors") return windows_of_ids(file, wanted, read);
  std::vector<CalibrationDocument> documents = read_documents(file);
  read.documents = static_cast<int64_t>(documents.size());
  const bool texts = std::ranges::all_of(documents, [](const auto& document) { return document.messages.empty(); });
  if (split == Split::kRandom && texts) return windows_of_text(documents, encoder, wanted, read);
  return windows_of_documents(documents, encoder, wanted, split, read);
}

}  // namespace

CalibrationWindows read_calibration(const CalibrationData& data, const Job& job) {
  TORCH_CHECK(!data.files.empty(), "read_calibration: expected at least one of `files`");
  const std::vector<size_t> file_of = shares(data.files, job.recipe.num_samples);
  DocumentEncoder encoder(job);
  CalibrationWindows result;
  std::vector<Tensor> windows, of_files;
  for (size_t f = 0; f < data.files.size(); ++f) {
    CalibrationRead read{.file = data.files[f].path, .windows = std::ranges::count(file_of, f)};
    // Another seed for each file, or a file that is given twice would have the same windows twice.
    constexpr uint64_t kSeedStep = 0x9E37'79B9'7F4A'7C15;
    const Wanted wanted{read.windows, job.recipe.seq_len, job.options.seed + f * kSeedStep};
    of_files.push_back(windows_of_file(read.file, encoder, wanted, data.split, read));
    result.files.push_back(std::move(read));
  }
  std::vector<int64_t> next(data.files.size());
  for (const size_t f : file_of) windows.push_back(of_files[f][next[f]++].to(at::kLong));
  result.windows = at::stack(windows);
  return result;
}

Tensor calibration_windows(const std::filesystem::path& file, const Job& job) {
  return read_calibration({.files = {{.path = file}}}, job).windows;
}

}  // namespace baseq

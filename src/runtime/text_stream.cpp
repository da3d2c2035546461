#include "text_stream.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <utility>

namespace baseq {

std::string TextStream::push(int32_t id) {
  if (!tokenizer_.has_token(id)) return "";
  window_.push_back(id);
  const Tokenizer::PartialText partial = tokenizer_.decode_partial(window_, /*skip_special_tokens=*/true);
  std::string piece;
  if (partial.settled > given_) {
    piece = partial.text.substr(given_, partial.settled - given_);
    given_ = partial.settled;
  }
  if (given_ == partial.text.size()) {
    // Without text of its own the rest of the window could not stand for the start of a text.
    std::vector<int32_t> rest(window_.begin() + static_cast<std::ptrdiff_t>(fresh_), window_.end());
    const size_t size = tokenizer_.decode(rest, /*skip_special_tokens=*/true).size();
    if (size > 0) {
      window_ = std::move(rest);
      given_ = size;
    }
    fresh_ = window_.size();
  }
  return piece;
}

std::string TextStream::finish() {
  std::string rest = tokenizer_.decode(window_, /*skip_special_tokens=*/true).substr(given_);
  given_ += rest.size();
  return rest;
}

StopStrings::StopStrings(std::vector<std::string> stops) : stops_(std::move(stops)) {
  for (const std::string& stop : stops_) TORCH_CHECK(!stop.empty(), "`stop` is empty; expected a text");
}

std::string StopStrings::push(std::string_view text) {
  if (found_) return "";
  held_ += text;
  size_t begin = 0, end = std::string::npos;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at == std::string::npos || at + stop.size() > end || (at + stop.size() == end && at >= begin)) continue;
    begin = at;
    end = at + stop.size();
  }
  if (end != std::string::npos) {
    found_ = true;
    held_.resize(begin);
    return std::exchange(held_, "");
  }
  size_t kept = 0;  // bytes at the end that may be the start of a stop string
  for (const std::string& stop : stops_) {
    for (size_t size = std::min(stop.size() - 1, held_.size()); size > kept; --size) {
      if (held_.ends_with(std::string_view(stop).substr(0, size))) kept = size;
    }
  }
  std::string safe = held_.substr(0, held_.size() - kept);
  held_.erase(0, safe.size());
  return safe;
}

std::string StopStrings::finish() { return std::exchange(held_, ""); }

}  // namespace baseq

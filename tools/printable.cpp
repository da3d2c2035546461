#include "printable.h"

#include <fmt/format.h>
#include <spdlog/details/log_msg.h>

#include "help.h"

namespace baseq::cli {
namespace {

constexpr size_t kMaxMessageBytes = size_t{1} << 14;

}  // namespace

std::string printable(std::string_view text) {
  std::string shown;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    // U+0080 to U+009F, which some terminals take for ESC and a letter, are C2 80 to C2 9F.
    const bool second = i > 0 && static_cast<unsigned char>(text[i - 1]) == 0xC2 && byte >= 0x80 && byte < 0xA0;
    if (second) {
      shown.pop_back();
      shown += fmt::format("\\x{:02x}", byte);
    } else if ((byte < 0x20 && byte != '\n' && byte != '\t') || byte == 0x7F) {
      shown += fmt::format("\\x{:02x}", byte);
    } else {
      shown += text[i];
    }
  }
  return shown;
}

void PrintableFormatter::format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) {
  const std::string_view payload(message.payload.data(), message.payload.size());
  std::string text = printable(with_flags(std::string(payload.substr(0, kMaxMessageBytes)), app_));
  if (payload.size() > kMaxMessageBytes) text += "...";
  spdlog::details::log_msg shown = message;
  shown.payload = text;
  inner_->format(shown, out);
  message.color_range_start = shown.color_range_start;
  message.color_range_end = shown.color_range_end;
}

std::unique_ptr<spdlog::formatter> PrintableFormatter::clone() const {
  return std::make_unique<PrintableFormatter>(inner_->clone(), app_);
}

}  // namespace baseq::cli

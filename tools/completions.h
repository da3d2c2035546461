#pragma once

#include <string>
#include <vector>

#include "command_table.h"

namespace baseq::cli {

/// The script by which `shell`, "bash", "zsh" or "fish", completes the words of a command.
std::string completion_script(const std::string& shell, const std::vector<CommandRow>& table);

}  // namespace baseq::cli

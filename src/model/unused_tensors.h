#pragma once

#include <string>
#include <vector>

#include "baseq/model/model.h"

namespace baseq {

/// Something of a checkpoint that Model does not use.
struct Unused {
  std::string reason;              ///< why, and what to do about it
  std::vector<std::string> names;  ///< of tensors, as the checkpoint spells them, or of files
  bool harmless = false;           ///< the model computes the same without it

  std::string message() const;  ///< one sentence with the first names
};

/// Everything in the checkpoint that the model leaves aside, by reason: tensors that it never asks for, and adapters.
/// What is not known to be harmless is not: a model without it computes something else than its maker meant, or this
/// program does not know what the checkpoint is. Reads a head that config.json ties, and biases that it denies: those
/// that change nothing are harmless.
std::vector<Unused> find_unused(const Model& model);

}  // namespace baseq

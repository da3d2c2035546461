#pragma once

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "baseq/io/checkpoint.h"
#include "baseq/model/model.h"
#include "baseq/pipeline/recipe.h"
#include "model_step.h"
#include "vocabulary_table.h"

namespace baseq {

/// Embedding, final norm and head of a quantized model: its tensors that are in no block.
class OutputTables {
 public:
  /// What is given must outlive this.
  /// @param recipe   with the grids of the model
  /// @param residual transform of the residual stream
  /// @param dtype    of what stays unquantized
  OutputTables(const Model& model, const Recipe& recipe, const Transform& residual, const at::ScalarType& dtype)
      : model_(model), recipe_(recipe), residual_(residual), dtype_(dtype) {}

  VocabularyTable embedding() const;

  struct Part {
    std::map<std::string, TensorInfo> infos;
    std::function<std::map<std::string, Tensor>()> make;
  };
  /// In the order in which they are written.
  /// @param embedding what embedding() returned; must outlive the parts
  std::vector<Part> parts(const VocabularyTable& embedding) const;

  /// A learned factor of the final norm's weight; undefined: 1.
  void set_norm_factor(Tensor factor) { norm_factor_ = std::move(factor); }

  /// For losses at the head, without the factor of the final norm.
  Heads heads(at::ScalarType products) const;

 private:
  at::Device device() const { return model_.options().device; }
  VocabularyTable head() const;
  Tensor base_norm() const;
  Tensor final_norm() const { return norm_factor_.defined() ? base_norm() * norm_factor_ : base_norm(); }
  Part part(const std::string& name, const std::optional<QuantSpec>& grid,
            const std::function<VocabularyTable()>& make) const;

  const Model& model_;
  const Recipe& recipe_;
  const Transform& residual_;
  const at::ScalarType& dtype_;
  Tensor norm_factor_;
};

}  // namespace baseq

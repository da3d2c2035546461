#include "output_tables.h"

#include <ATen/ATen.h>

#include "model/named_tensors.h"
#include "model/quantized_linear.h"

namespace baseq {

VocabularyTable OutputTables::embedding() const {
  const Tensor table = model_.tensors().tensor("model.embed_tokens.weight").to(device());
  return make_table(table, {}, residual_, recipe_.grids.embedding, dtype_);
}

VocabularyTable OutputTables::head() const {
  const bool tied = model_.config().tie_word_embeddings;
  const Tensor stored = model_.tensors().tensor(tied ? "model.embed_tokens.weight" : "lm_head.weight");
  return make_table(stored.to(device()), model_.final_norm().weight, residual_, recipe_.grids.head, dtype_);
}

/// Its gain goes into a head that is rotated.
Tensor OutputTables::base_norm() const {
  const Tensor norm = model_.final_norm().weight;
  return residual_.empty() ? norm.to(at::kFloat) : at::ones_like(norm, at::kFloat);
}

OutputTables::Part OutputTables::part(const std::string& name, const std::optional<QuantSpec>& grid,
                                      const std::function<VocabularyTable()>& make) const {
  const int64_t rows = model_.config().vocab_size, columns = model_.config().hidden_size;
  Part result{.infos = {{name + ".weight", {dtype_, {rows, columns}}}}, .make = {}};
  if (grid) result.infos = quantized_weight_infos(name, *grid, rows, columns);
  result.make = [name, make] { return make().tensors(name); };
  return result;
}

std::vector<OutputTables::Part> OutputTables::parts(const VocabularyTable& embedding) const {
  const std::string norm_name = "model.norm.weight";
  Part norm{.infos = {{norm_name, {at::kFloat, {model_.config().hidden_size}}}}, .make = {}};
  norm.make = [this, norm_name] { return std::map<std::string, Tensor>{{norm_name, final_norm().cpu()}}; };
  const Part head = part("lm_head", recipe_.grids.head, [this] { return this->head(); });
  const Part table = part("model.embed_tokens", recipe_.grids.embedding, [&embedding] { return embedding; });
  if (!residual_.empty()) return {head, norm, table};
  if (model_.config().tie_word_embeddings && recipe_.keeps_tied_head()) return {norm, table};
  return {norm, head, table};
}

Heads OutputTables::heads(at::ScalarType products) const {
  const double eps = model_.config().rms_norm_eps;
  const VocabularyTable table = head();
  Tensor weight = table.codes ? table.codes->dequantized().to(device()) : table.values.to(at::kFloat);
  if (const double scaling = model_.config().logits_scaling; scaling != 1) weight = weight / scaling;
  return {.student = {.norm = {.weight = base_norm(), .eps = eps}, .weight = weight.to(products)},
          .teacher = {.norm = {.weight = model_.final_norm().weight.to(at::kFloat), .eps = eps},
                      .weight = model_.lm_head().weight.to(products)}};
}

}  // namespace baseq

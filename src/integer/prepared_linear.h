#pragma once

#include <memory>
#include <span>

#include "activations.h"
#include "baseq/quant/gptq.h"
#include "baseq/quant/low_rank.h"
#include "integer_kernels.h"

namespace baseq {

/// The kernels of find_integer_kernels(). Throws c10::Error if BASEQ_KERNELS names none that this processor runs.
const IntegerKernels& integer_kernels();

/// A quantized linear, repacked once into the layout that all instruction sets read. docs/arithmetic.md defines its
/// product to the bit: a row of it depends neither on the other rows, the threads nor the instruction set.
class PreparedLinear {
 public:
  /// @param weight    2 to 8 bits, static; zero points are whole numbers
  /// @param low_rank  optional correction that is added to the weight
  /// @param bias      optional [out_features]
  /// Throws c10::Error when shapes do not fit, or a group has more columns than its sums allow.
  explicit PreparedLinear(const QuantizedWeight& weight, const LowRankFactors& low_rank = {}, const Tensor& bias = {});

  /// Linears that read one input, whose panels lie one after the other: joint() of each computes all of them. Nothing
  /// where weights differ in their bits, groups or zero points, or some have a bias and others have none.
  /// @param biases  as many as weights; undefined: none
  static std::vector<std::shared_ptr<const PreparedLinear>> together(std::span<const QuantizedWeight* const> weights,
                                                                     std::span<const Tensor> biases);
  /// The linears that were prepared together with this one, as one, whose row first_row() is the first of this one;
  /// null: it was prepared alone.
  const std::shared_ptr<const PreparedLinear>& joint() const { return joint_; }
  int64_t first_row() const { return first_row_; }

  /// float32 [rows, out_features].
  /// @param x  with columns() of this linear
  Tensor forward(const Activations& x, const IntegerKernels& kernels = integer_kernels()) const;

  /// The groups by which activations have to be quantized.
  const ColumnGroups& columns() const { return columns_; }
  int64_t out_features() const { return out_features_; }
  int64_t bytes() const;

 private:
  PreparedLinear(std::shared_ptr<const PreparedLinear> joint, int64_t first_row, int64_t out_features);
  void pack_panels(const QuantizedWeight& weight);
  void pack_low_rank(const LowRankFactors& low_rank);
  WeightPanels panels() const;
  Tensor project(const Activations& x, const IntegerKernels& kernels) const;

  ColumnGroups columns_;
  int64_t out_features_ = 0, num_bits_ = 0;
  bool has_zero_points_ = false;
  at::ScalarType scale_dtype_ = at::kFloat;
  Tensor panels_;      ///< uint8 [panels, bytes], see WeightPanels
  Tensor row_sums_;    ///< float32 [panels * 16]
  Tensor bias_;        ///< float32 [panels * 16] or undefined
  Tensor down_;        ///< [rank / 16, padded columns, 16], or undefined
  Tensor up_;          ///< [panels, rank, 16], the same type
  Tensor rank_scale_;  ///< float32 [rank]: both scales of int8 factors, else undefined
  std::shared_ptr<const PreparedLinear> joint_;
  int64_t first_row_ = 0;
};

}  // namespace baseq

#pragma once

/// baseq, everything at once. Include it to try things out; a header of its own compiles faster, above all those of
/// quant/ and transform/, which stand alone.
///
///     #include <baseq/baseq.h>
///     const at::Tensor w = at::randn({256, 512}), x = at::randn({2048, 512});
///     const baseq::GptqResult q = baseq::gptq(w, baseq::second_moments(x), {.num_bits = 4});
///
/// Errors are c10::Error, whose what_without_backtrace() is the sentence alone. Options are named in backticks.

#include <ATen/ATen.h>

#include "baseq/cluster/communicator.h"
#include "baseq/eval/evaluate.h"
#include "baseq/export/export_checkpoint.h"
#include "baseq/formats/open_model.h"
#include "baseq/io/checkpoint.h"
#include "baseq/model/decoder.h"
#include "baseq/model/model.h"
#include "baseq/pipeline/job.h"
#include "baseq/pipeline/recipe.h"
#include "baseq/quant/gptq.h"
#include "baseq/quant/low_rank.h"
#include "baseq/quant/quantize.h"
#include "baseq/runtime/chat_template.h"
#include "baseq/runtime/generate.h"
#include "baseq/tokenizer/token_windows.h"
#include "baseq/tokenizer/tokenizer.h"
#include "baseq/transform/hadamard.h"
#include "baseq/transform/transform.h"
#include "baseq/version.h"

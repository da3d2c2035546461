// Every struct that a user may fill, with one member named: -Wextra warns of those without a default that are not.
#include <baseq/baseq.h>
#include <baseq/conv/quantized_conv.h>

namespace {

template <class... Structs>
int64_t count(const Structs&...) {
  return sizeof...(Structs);
}

int64_t of_tensors() {
  using namespace baseq;
  return count(QuantSpec{.num_bits = 4}, QParams{.scale = {}}, QuantizedWeight{.spec = {}}, MseSearch{.norm = 2},
               RuntimeSmooth{.group = 8}, QuantPoint{.enabled = true}, GptqOptions{.damping = 0.1},
               GptqResult{.damping = 0.1}, LowRankCorrection{.removed = 1}, LowRankFactors{.A = {}},
               FbquantOptions{.rank = 8}, FbquantResult{.loss_before = 1}, Factor{.block = 4}, TextPart{.text = ""},
               Tokenizer::PartialText{.settled = 1});
}

int64_t of_models() {
  using namespace baseq;
  return count(
      TensorInfo{.dtype = at::kHalf}, CheckpointWriter::Options{.force = true}, CheckpointWriter::Expected{.name = ""},
      Checkpoint::MadeTensor{.info = {}}, RopeParameters{.theta = 1e6}, ModelConfig{.hidden_size = 64},
      ModelConfig::Block{.rope = false}, RotaryFrequencies{.attention_factor = 1}, RotaryEmbedding{.cos = {}},
      Linear{.weight = {}}, RmsNorm{.eps = 1e-5}, Attention{.num_heads = 2}, Mlp{.exact = false},
      DecoderLayer{.residual_multiplier = 1}, LinearShape{.name = ""}, NormShape{.name = ""},
      LoadOptions{.activation_bits = 8}, Model::Options{.dtype = at::kHalf}, SiteInfo{.name = ""},
      SiteShape{.features = 8}, LinearFormat{.group_index = false}, QuantizationConfig{.lora_rank = 1},
      StoredTransform{.names = {}}, StoredChat{.path = ""}, CacheFormat{.stored = at::kHalf}, CachedRows{.block = 0});
}

int64_t of_runs() {
  using namespace baseq;
  return count(TransformStep{.strength = 0.5}, ChooseStep{.threshold = 1}, PointsStep{.clip = 0.9},
               LearnStep{.epochs = 1}, LowRankOptions{.rank = 8}, RoundStep{.quantized_inputs = true},
               Pass{.steps = {}}, GridOverride{.linears = {}}, Grids{.weights = {}}, Recipe{.num_samples = 8},
               BuiltInRecipe{.name = ""}, RunStarted{.seed = 1}, RunResumed{.num_finished = 1},
               BlockStarted{.block = 1}, LinearRounded{.block = 1}, EpochLearned{.block = 1}, StageLearned{.block = 1},
               ActivationRange{.min = 1}, PointMeasured{.block = 1}, TransformChosen{.block = 1},
               BlockFinished{.block = 1}, Warning{.message = ""}, RunFinished{.seconds = 1}, QuantizeOptions{.seed = 1},
               Communicator{.rank = 1}, Job{.recipe = {}}, CalibrationData{.files = {}},
               CalibrationData::File{.path = ""}, CalibrationRead{.windows = 1}, CalibrationWindows{.windows = {}},
               Footprint{.parts = {}}, Footprint::Part{.what = ""}, RunPlan{.num_blocks = 1}, MemoryChoice{.bytes = 1},
               MemoryFit{.smallest = {}}, StoredRun{.num_threads = 1});
}

int64_t of_use() {
  using namespace baseq;
  return count(Evaluation{.perplexity = 1}, EvaluateOptions{.load = {}}, ExportOptions{.gguf_type = "Q4_0"},
               PlannedTensor{.name = ""}, ExportedTensor{.name = ""}, ExportPlan{.readme = ""}, Message{.role = "user"},
               Date{.year = 2025}, SamplingOptions{.top_k = 1}, TokenLogprobs{.id = 1}, GenerationConfig{.eos = {}},
               GenerateOptions{.max_tokens = 1}, Piece{.id = 1}, Answer{.text = ""}, Session::Options{.context = 8});
}

int64_t of_convolutions() {
  using namespace baseq;
  return count(ConvAlgorithm{.divisor = 1}, ConvAlgorithm2d{.divisor = 1}, Padding{.top = 1},
               ConvQuantization{.weights = {}}, QuantizedConv2d{.padding = {}}, ConvDistillation{.steps = 1},
               DistilledConv2d{.error_before = 1}, ConvLayer{.padding = {}});
}

}  // namespace

int64_t structs();
int64_t structs() { return of_tensors() + of_models() + of_runs() + of_use() + of_convolutions(); }

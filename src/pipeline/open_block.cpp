#include "open_block.h"

#include <utility>

namespace baseq {

OpenBlock::OpenBlock(BlockState state, BlockPlace place, std::function<DecoderLayer()> read_original)
    : state_(std::move(state)), place_(std::move(place)), read_original_(std::move(read_original)) {}

void OpenBlock::edit(const std::function<void(BlockState&)>& edit) {
  edit(state_);
  layer_.reset();
  measured_.reset();
  passed_ = {};
}

void OpenBlock::edit_points(const std::function<void(BlockState&)>& edit) {
  edit(state_);
  passed_ = {};
  if (layer_) realize_points(*layer_, split_transforms(state_, place_), state_, place_);
}

void OpenBlock::round(const std::string& name, WeightState weight) {
  layer();
  measured_.reset();
  passed_ = {};
  round_linear(layer_->linear(name), weight, place_);
  state_.weights[name] = std::move(weight);
}

const DecoderLayer& OpenBlock::original() {
  if (!original_) original_ = read_original_();
  return *original_;
}

const DecoderLayer& OpenBlock::layer() {
  if (!layer_) layer_ = realize(original(), state_, place_);
  return *layer_;
}

DecoderLayer OpenBlock::release_layer() {
  layer();
  return *std::exchange(layer_, std::nullopt);
}

const BlockMoments& OpenBlock::moments(const BlockTask& task, Stream stream, Site last) {
  if (!measured_ || measured_->stream != stream || measured_->last < last) {
    measured_ = {stream, last,
                 measure_block(layer(), task.stream(stream), task.inputs.rope, task.token_weights, {.last = last},
                               task.inputs.pass)};
  }
  return measured_->moments;
}

DecoderLayer OpenBlock::take_layer() {
  measured_.reset();
  if (layer_) return *std::exchange(layer_, std::nullopt);
  original();
  return realize(*std::exchange(original_, std::nullopt), state_, place_);
}

}  // namespace baseq

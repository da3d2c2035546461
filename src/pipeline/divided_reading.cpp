#include "pipeline/divided_reading.h"

#include <ATen/ATen.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cluster/messages.h"
#include "cluster/owners.h"

namespace baseq {
namespace {

/// "model.layers.7." of a tensor of that block; empty for what is in no block.
std::string block_of_name(const std::string& name) {
  constexpr std::string_view kLayers = "layers.";
  const size_t layers = name.find(kLayers);
  if (layers == std::string::npos) return "";
  return name.substr(0, name.find('.', layers + kLayers.size()) + 1);
}

/// What one process reads of the blocks.
class DividedReading {
 public:
  /// @param keeps_last whether a tensor is asked for several times in a row, by those who read parts of it
  DividedReading(Checkpoint checkpoint, Communicator communicator, bool keeps_last)
      : checkpoint_(std::move(checkpoint)), communicator_(std::move(communicator)), keeps_last_(keeps_last) {
    for (const std::string& name : checkpoint_.names()) {
      if (const std::string block = block_of_name(name); !block.empty()) blocks_[block].push_back(name);
    }
    for (const auto& [block, names] : blocks_) {
      std::vector<int64_t> bytes;
      for (const std::string& name : names) bytes.push_back(checkpoint_.info(name).nbytes());
      const std::vector<int64_t> owners = owners_by_work(bytes, communicator_.size);
      for (size_t i = 0; i < names.size(); ++i) owners_[names[i]] = owners[i];
    }
  }

  bool divides(const std::string& name) const { return owners_.contains(name); }

  Tensor tensor(const std::string& name) {
    if (keeps_last_ && name == last_name_) return last_;
    if (!to_come_.contains(name)) read_ahead(block_of_name(name));
    to_come_.erase(name);
    const auto own = ahead_.find(name);
    Tensor value = own == ahead_.end() ? Tensor() : std::move(own->second);
    if (own != ahead_.end()) ahead_.erase(own);
    value = broadcast(communicator_, value, owners_.at(name));
    if (keeps_last_) {
      last_name_ = name;
      last_ = value;
    }
    return value;
  }

 private:
  /// All read their shares at the same time, before the first tensor is sent.
  void read_ahead(const std::string& block) {
    const std::vector<std::string>& names = blocks_.at(block);
    to_come_ = {names.begin(), names.end()};
    ahead_.clear();
    for (const std::string& name : names) {
      if (owners_.at(name) == communicator_.rank) ahead_[name] = checkpoint_.tensor(name).clone();
    }
    checkpoint_.release_pages();
  }

  Checkpoint checkpoint_;
  Communicator communicator_;
  bool keeps_last_;
  std::map<std::string, std::vector<std::string>> blocks_;
  std::map<std::string, int64_t> owners_;
  std::set<std::string> to_come_;        ///< of the block that is being read
  std::map<std::string, Tensor> ahead_;  ///< of these, what this process has read
  std::string last_name_;
  Tensor last_;
};

}  // namespace

StoredModel read_together(StoredModel stored, const Communicator& communicator) {
  if (communicator.size == 1) return stored;
  const Checkpoint checkpoint = stored.tensors;
  const auto reading =
      std::make_shared<DividedReading>(checkpoint, communicator, /*keeps_last=*/stored.config.fused_projections);
  Checkpoint::MadeTensors tensors;
  for (const std::string& name : checkpoint.names()) {
    tensors[name] = {checkpoint.info(name), [checkpoint, reading, name] {
                       return reading->divides(name) ? reading->tensor(name) : checkpoint.tensor(name);
                     }};
  }
  stored.tensors = Checkpoint(checkpoint.path(), checkpoint.config(), std::move(tensors), checkpoint.num_bytes());
  return stored;
}

}  // namespace baseq

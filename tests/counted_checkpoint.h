#pragma once

#include <map>
#include <memory>
#include <string>

#include "baseq/io/checkpoint.h"

namespace baseq::test {

/// The tensors of a checkpoint, and how often each was read.
class CountedCheckpoint {
 public:
  explicit CountedCheckpoint(const Checkpoint& stored) : checkpoint_(counted(stored, reads_)) {}
  const Checkpoint& checkpoint() const { return checkpoint_; }
  int64_t reads(const std::string& name) const { return (*reads_)[name]; }

 private:
  using Reads = std::shared_ptr<std::map<std::string, int64_t>>;
  static Checkpoint counted(const Checkpoint& stored, const Reads& reads) {
    Checkpoint::MadeTensors tensors;
    for (const std::string& name : stored.names()) {
      tensors[name] = {stored.info(name), [stored, name, reads] {
                         ++(*reads)[name];
                         return stored.tensor(name);
                       }};
    }
    return {stored.path(), stored.config(), std::move(tensors), stored.num_bytes()};
  }

  Reads reads_ = std::make_shared<std::map<std::string, int64_t>>();
  Checkpoint checkpoint_;
};

}  // namespace baseq::test

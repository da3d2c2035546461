#include "baseq/version.h"

namespace baseq {

std::string version() { return BASEQ_VERSION; }

}  // namespace baseq

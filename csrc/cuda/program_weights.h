// Where the weights of a program lie, and what they are.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/program.h"

namespace fastvq::cuda {

// Puts the weights into a program that is complete but for them and shared_bytes. Blocks keep as many in shared memory
// as fit into `shared_limit` bytes beside what instructions work on.
void pack_weights(Program& program, const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms,
                  const StepShape& shape, int64_t shared_limit);

}  // namespace fastvq::cuda

// The steps of an instruction: what it computes channel by channel, as a program that threads work through.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/program_tasks.h"

namespace fastvq::cuda {

// How far each operation's result goes, by operation. `rounding`: whether products take bfloat16.
std::vector<Stores> stores_of(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output,
                              const TaskLists& lists, bool rounding);

struct Chain {
    std::vector<Step> steps;  // loads first
    int32_t planes;           // that they need
};

// Of the operations of one instruction, in the order in which they run.
Chain make_chain(const std::vector<OpSpec>& ops, const std::vector<int64_t>& group, const std::vector<Stores>& stores);

}  // namespace fastvq::cuda

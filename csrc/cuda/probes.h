// How fast this GPU does what a step cannot do without: meet, pass a flag on, start a kernel.
#pragma once

#include <cstdint>

namespace fastvq::cuda {

// Microseconds, each over many repeats after a warm-up, between two events on a stream of its own. Errors of the runtime
// come as std::runtime_error with the name of the call and CUDA's text; a device, count or number of blocks that cannot
// be as std::invalid_argument.

// All blocks of a cooperative launch meeting once: every one raises a counter and waits for all. 0 blocks: one for each
// multiprocessor.
double barrier_microseconds(int blocks, int64_t rounds, int device);

// One thread of a block raising a counter until one of another block has seen it.
double flag_hop_microseconds(int64_t rounds, int device);

struct LaunchGap {
    double plain;  // from one empty kernel to the next on a stream
    double graph;  // the same inside a graph that is launched as a whole
};
LaunchGap launch_microseconds(int64_t count, int device);

}  // namespace fastvq::cuda

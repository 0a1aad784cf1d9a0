// Kernels small enough to say what each schedule may do to them, for tests of the emulation itself.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda_runtime.h"

namespace toys {

constexpr int kThreads = 64;

enum Site : int { kWritten, kRead, kFlag, kRaise, kOther };

struct Arguments {
    float* out;
    const float* in;
    const uint32_t* fragments;  // [2][32][10]: four of A, two of B, four of the sums, of two warps
    uint32_t* counters;
    int rounds;
};

// Every thread passes a number to its neighbour through shared memory, `rounds` times.
void ring(Arguments arguments);
// Block b adds 1 to what block b - 1 hands on, block 0 to its own number; by flags, `rounds` times.
void chain(Arguments arguments);
// Two blocks, each of which waits for the other's flag before it raises its own.
void deadlock(Arguments arguments);
// The first half of a block comes to another barrier than the rest, or leaves.
void split(Arguments arguments);
void leave(Arguments arguments);
void matrix(Arguments arguments);
// Sums over warps by shuffles: float in out[thread], double in out[kThreads + thread].
void sums(Arguments arguments);
// The bits that shared memory begins with; writes behind its end if `rounds` is not 0.
void shared(Arguments arguments);
// Block 1 reads with a plain load (rounds = 0) or as shared state (1) what block 0 has stored as shared state.
void handed(Arguments arguments);

// What out, of `size` floats, is after a launch of a kernel by name, from `in`; NaN where nothing was written. Throws
// what the launch throws, and std::runtime_error with the runtime's name for its error.
std::vector<float> run(const char* kernel, int blocks, int rounds, int64_t shared_bytes, const std::vector<float>& in,
                       const std::vector<uint32_t>& fragments, int64_t size);

}  // namespace toys

// When instructions begin, have waited, have worked and have signalled: noted in builds with FASTVQ_TRACE, for
// python -m bench.gpu.trace; other builds have nothing of it.
#pragma once

#include "cuda/device.h"
#include "cuda/step_kernel.h"

namespace fastvq::cuda {

#if defined(FASTVQ_TRACE)

// By the thread that signals, in clocks of its multiprocessor; for the first mark in nanoseconds of the device as well,
// by which blocks are laid beside each other.
FASTVQ_DEVICE void note(const StepArgs& args, int column, int instr, Mark mark) {
    if (args.trace == nullptr || threadIdx.x != kThreads - 1) return;
    const int64_t place = (int64_t{blockIdx.x} * args.width + column) * args.traced_instrs + instr;
    int64_t* times = args.trace + place * kMarks;
    if (mark == Mark::kBegun) times[static_cast<int>(Mark::kNanoseconds)] = nanoseconds();
    times[static_cast<int>(mark)] = clocks();
}

#else

FASTVQ_DEVICE void note(const StepArgs&, int, int, Mark) {}

#endif

}  // namespace fastvq::cuda

// The kernel that fills one row of codes, and what it is launched with. All pointers are of the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/program.h"

namespace fastvq::cuda {

// What a traced build notes of an instruction, in the order in which it lies in memory.
enum class Mark : int { kBegun, kWaited, kWorked, kSignalled, kNanoseconds };
constexpr int kMarks = 5;

struct StepArgs {
    const Instr* instrs;
    const Block* blocks;
    const Wait* waits;
    const Term* terms;
    const Step* steps;
    const char* weights;
    uint32_t* counters;  // zero at the start of a launch
    int32_t finished_counter;
    Layout layout;
    int64_t stationary_bytes;  // of shared memory before what `memory` divides
    BlockMemory memory;

    const DeviceView* values;  // by operation
    const DeviceView* starts;
    int32_t batch, width, num_codes;
    int64_t key_stride;
    int32_t row;
    int64_t* codes;  // [batch][width] of this row; read and written
    int64_t code_stride;
    const float* uniforms;
    int64_t uniform_stride;
    const uint8_t* known;
    int64_t known_stride;
    float temperature;
    int32_t top_k;
    float top_p;
    // The smallest (row * width + column) * batch + sample of a position whose logits cannot be drawn from, or what it
    // was before; such a position gets code 0 and the row goes on.
    unsigned long long* status;
#if defined(FASTVQ_TRACE)
    int64_t* trace;  // [blocks][width][traced_instrs][kMarks] of this row, or null
    int32_t traced_instrs;
#endif
};

// The kernel, for cudaLaunchCooperativeKernel with kThreads threads: void step_row(StepArgs).
const void* step_kernel();

// cudaLaunchCooperativeKernel of it.
cudaError_t launch_step(const StepArgs& args, int blocks, int64_t shared_bytes, cudaStream_t stream);

}  // namespace fastvq::cuda

// The kernel that fills one row of codes, and what it is launched with. All pointers are of the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/program.h"

namespace fastvq::cuda {

// Where an operation's vectors lie: sample b, column c at data + b * batch_stride + (c & column_mask) * column_stride.
// The mask is -1 for rows of vectors, 1 for vectors of the current position alone (two places, taken in turn), 0 for
// vectors that are the same at all positions. Attention's keys and values lie as in the CPU engine (grid_plan.h).
struct DeviceView {
    float* data;
    int64_t batch_stride;
    int64_t column_stride;
    int64_t column_mask;
};

struct StepArgs {
    const Instr* instrs;
    const Block* blocks;
    const Wait* waits;
    const Term* terms;
    const char* weights;
    uint32_t* counters;  // zero at the start of a launch
    int32_t finished_counter;
    int64_t work_offset;  // bytes of shared memory before the part that instructions work in

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
};

// The kernel, for cudaLaunchCooperativeKernel with kThreads threads: void step_row(StepArgs).
const void* step_kernel();

// cudaLaunchCooperativeKernel of it.
cudaError_t launch_step(const StepArgs& args, int blocks, int64_t shared_bytes, cudaStream_t stream);

}  // namespace fastvq::cuda

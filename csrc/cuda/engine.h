// A plan on a GPU: its program and weights in device memory, launched once per row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "cpu/draw.h"
#include "cuda/program.h"
#include "cuda/step_kernel.h"

namespace fastvq::cuda {

struct EngineSettings {
    int device;
    bool bf16;
    int blocks;            // at most; 0: one for each multiprocessor
    int64_t shared_limit;  // bytes a block may use; 0: what the device offers
};

struct RowLaunch {
    int64_t row;
    const DeviceView* host_views;    // [2][num_ops]: values, then starts; checked before the launch
    const DeviceView* device_views;  // the same in device memory
    int64_t* codes;
    int64_t code_stride;
    const float* uniforms;
    int64_t uniform_stride;
    const uint8_t* known;
    int64_t known_stride;
    fastvq::cpu::DrawOptions draw;
    unsigned long long* status;
    cudaStream_t stream;
};

// Errors of the runtime come as std::runtime_error with the name of the call and CUDA's text.
class StepEngine {
   public:
    StepEngine(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output, StepShape shape,
               const EngineSettings& settings);
    ~StepEngine();
    StepEngine(const StepEngine&) = delete;
    StepEngine& operator=(const StepEngine&) = delete;

    // Enqueues one row and returns at once. Rows of one engine must not overlap: they share the counters, so all of them
    // belong on one stream. Can be captured: nothing is allocated or waited for.
    void run_row(const RowLaunch& launch) const;

    // Throws std::invalid_argument if a view that would be read or written leads nowhere, or is not kept for as long as
    // blocks that run apart need it.
    void check_views(const DeviceView* values, const DeviceView* starts) const;

    int64_t weight_bytes() const;      // of the program, in device memory
    int64_t stationary_bytes() const;  // of these, kept in shared memory during a row
    int blocks() const;
    int64_t instructions() const;  // of the block that has most, for a position
    int64_t waits() const;         // likewise
    int64_t shared_bytes() const;
    const StepShape& shape() const;
    int64_t num_ops() const;

#if defined(FASTVQ_TRACE)
    // What rows note from now on, [blocks][width][instructions][kMarks] of the last row in device memory; null: nothing.
    void set_trace(int64_t* times);
    // The instructions of a block.
    std::vector<Instr> program(int block) const;
#endif

   private:
    struct State;
    State* state_;
};

}  // namespace fastvq::cuda

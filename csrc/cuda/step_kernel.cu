#include "cuda/step_kernel.h"

#include "cuda/affine.cuh"
#include "cuda/attend.cuh"
#include "cuda/chain.cuh"
#include "cuda/draw.cuh"
#include "cuda/trace.cuh"

namespace fastvq::cuda {
namespace {

// The barrier before the first instruction stands between this and the weights' use.
FASTVQ_DEVICE void copy_stationary(const StepArgs& args, const Block& block, char* shared) {
    const auto* from = reinterpret_cast<const uint4*>(args.weights + block.stationary_first);
    auto* to = reinterpret_cast<uint4*>(shared);
    const int vectors = static_cast<int>(block.stationary_bytes / 16);
    for (int i = threadIdx.x; i < vectors; i += kThreads) to[i] = load_streamed(from + i);
}

FASTVQ_DEVICE void wait_for(const StepArgs& args, const Wait& wait, int column, Site site) {
    const int source = column - wait.lag;
    if (source < 0) return;
    wait_at_least(args.counters + counter_place(wait.counter, source), counter_target(wait.per_column, source), site);
}

// Each wait by another thread, so that they last no longer than one.
FASTVQ_DEVICE void wait_for_sources(const StepArgs& args, const BlockState& state, const Instr& instr) {
    for (int w = threadIdx.x; w < instr.num_waits; w += kThreads) {
        wait_for(args, state.waits[instr.first_wait + w], state.column, Site::kWaitSources);
    }
}

// A chain, or a product and its chain, for some samples at a time.
FASTVQ_DEVICE void slice(const StepArgs& args, const BlockState& state, const Instr& instr) {
    const int samples = samples_at_once(args.batch);
    for (int first = 0; first < args.batch; first += samples) {
        const int rows = smaller(samples, args.batch - first);
        Sums sums{};
        if (instr.code == Code::kAffine) {
            if (first > 0) block_barrier(Site::kPartialsUsed);
            sums = affine(args, state, instr, first, rows);
            block_barrier(Site::kPartialsWritten);
        }
        chain(args, state, instr, sums, first, rows);
    }
}

FASTVQ_DEVICE void execute(const StepArgs& args, const BlockState& state, const Instr& instr) {
    switch (instr.code) {
        case Code::kAttend:
            attend(args, state, instr);
            break;
        case Code::kDraw:
            draw(args, state, instr);
            break;
        default:
            slice(args, state, instr);
    }
}

__global__ void __launch_bounds__(kThreads, 1) step_row(const __grid_constant__ StepArgs args) {
    char* shared = dynamic_shared();
    const Block block = args.blocks[blockIdx.x];
    copy_stationary(args, block, shared);
    BlockState state = hold_program(args, block, shared);
    block_barrier(Site::kProgramHeld);
    const int count = block.last_instr - block.first_instr;
    const Wait finished{args.finished_counter, static_cast<int32_t>(gridDim.x), 2};
    for (int column = 0; column < args.width; ++column) {
        state.column = column;
        for (int i = 0; i < count; ++i) {
            const Instr& instr = state.instrs[i];
            note(args, column, i, Mark::kBegun);
            find_segments(state, instr);
            load_early(args, state, instr);
            wait_for_sources(args, state, instr);
            // By another thread, so that it does not begin when another wait ends.
            if (i == 0 && threadIdx.x == kThreads / 2) wait_for(args, finished, column, Site::kWaitColumn);
            block_barrier(Site::kAfterWait);
            note(args, column, i, Mark::kWaited);
            execute(args, state, instr);
            note(args, column, i, Mark::kWorked);
            // Without a signal, the barrier after the next wait is enough.
            if (instr.signal < 0) continue;
            block_barrier(Site::kBeforeSignal);
            // By the last warp: the first one is to wait for the next instruction.
            if (threadIdx.x == kThreads - 1) {
                signal(args.counters + counter_place(instr.signal, column), Site::kSignalTask);
            }
            note(args, column, i, Mark::kSignalled);
        }
        if (threadIdx.x == kThreads - 1) {
            signal(args.counters + counter_place(args.finished_counter, column), Site::kSignalColumn);
        }
    }
}

}  // namespace

const void* step_kernel() { return reinterpret_cast<const void*>(&step_row); }

cudaError_t launch_step(const StepArgs& args, int blocks, int64_t shared_bytes, cudaStream_t stream) {
    void* arguments[] = {const_cast<StepArgs*>(&args)};
    return cudaLaunchCooperativeKernel(step_kernel(), dim3(blocks), dim3(kThreads), arguments,
                                       static_cast<std::size_t>(shared_bytes), stream);
}

}  // namespace fastvq::cuda

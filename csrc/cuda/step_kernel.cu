#include "cuda/step_kernel.h"

#include "cuda/affine.cuh"
#include "cuda/attend.cuh"
#include "cuda/draw.cuh"
#include "cuda/elementwise.cuh"

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
FASTVQ_DEVICE void wait_for_sources(const StepArgs& args, const Instr& instr, int column) {
    for (int w = threadIdx.x; w < instr.num_waits; w += kThreads) {
        wait_for(args, args.waits[instr.first_wait + w], column, Site::kWaitSources);
    }
}

FASTVQ_DEVICE void execute(const StepArgs& args, BlockState& state) {
    switch (state.prepared->instr.code) {
        case Code::kLookup:
            lookup(args, state);
            break;
        case Code::kAffine:
            affine(args, state);
            break;
        case Code::kStoreKeys:
            store_keys(args, state);
            break;
        case Code::kAttend:
            attend(args, state);
            break;
        case Code::kDraw:
            draw(args, state);
            break;
        default:
            elementwise(args, state);
    }
}

__global__ void __launch_bounds__(kThreads, 1) step_row(const __grid_constant__ StepArgs args) {
    char* shared = dynamic_shared();
    char* common = shared + args.work_offset;
    const Block block = args.blocks[blockIdx.x];
    copy_stationary(args, block, shared);

    BlockState state{};
    auto* memory = reinterpret_cast<Common*>(common);
    state.segments = memory->segments;
    state.kept = reinterpret_cast<float*>(common + kPreparedBytes);
    state.work = common + kCommonBytes;
    state.stationary = shared;
    const Wait finished{args.finished_counter, static_cast<int32_t>(gridDim.x), 2};
    for (int column = 0; column < args.width; ++column) {
        state.column = column;
        state.kept_op = -1;
        for (int i = block.first_instr; i < block.last_instr; ++i) {
            const bool first = i == block.first_instr;
            state.prepared = memory->prepared + (i & 1);
            const bool ready = !first && state.prepared->index == i;
            if (!ready) prepare(args, args.instrs[i], state);
            if (i + 1 < block.last_instr) prepare_next(args, i + 1, memory->prepared[(i + 1) & 1], column);
            if (!ready) {
                wait_for_sources(args, args.instrs[i], column);
                // By another thread, so that it does not begin when another wait ends.
                if (first && threadIdx.x == kThreads / 2) wait_for(args, finished, column, Site::kWaitColumn);
                block_barrier(Site::kAfterWait);
            }
            const int signal_to = state.prepared->instr.signal;
            execute(args, state);
            block_barrier(signal_to >= 0 ? Site::kBeforeSignal : Site::kBetweenInstrs);
            if (signal_to >= 0 && threadIdx.x == 0) {
                signal(args.counters + counter_place(signal_to, column), Site::kSignalTask);
            }
        }
        if (threadIdx.x == 0) signal(args.counters + counter_place(args.finished_counter, column), Site::kSignalColumn);
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

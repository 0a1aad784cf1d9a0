#include "cuda/engine.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda/runtime.h"

namespace fastvq::cuda {
namespace {

struct FreeDevice {
    void operator()(void* data) const { static_cast<void>(cudaFree(data)); }
};

template <class T>
using DeviceArray = std::unique_ptr<T[], FreeDevice>;

template <class T>
DeviceArray<T> allocate(std::size_t count) {
    void* data = nullptr;
    check_call(cudaMalloc(&data, std::max<std::size_t>(count, 1) * sizeof(T)), "cudaMalloc");
    return DeviceArray<T>(static_cast<T*>(data));
}

template <class T>
DeviceArray<T> upload(const std::vector<T>& from) {
    DeviceArray<T> array = allocate<T>(from.size());
    if (!from.empty()) {
        check_call(cudaMemcpy(array.get(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    return array;
}

int64_t attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    check_call(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
}

// How many blocks of so much shared memory the device holds at once.
int64_t resident_blocks(int64_t shared_bytes, int64_t multiprocessors) {
    int blocks = 0;
    check_call(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, step_kernel(), kThreads,
                                                             static_cast<std::size_t>(shared_bytes)),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return blocks * multiprocessors;
}

}  // namespace

struct StepEngine::State {
    int device = 0;
    std::vector<OpSpec> ops;  // without their weights
    std::vector<TermSpec> terms;
    StepShape shape{};
    int32_t finished_counter = 0;
    std::size_t counter_bytes = 0;
    int64_t blocks = 0, most_instrs = 0, most_waits = 0, weight_bytes = 0, stationary_bytes = 0, shared_bytes = 0;
    Layout layout{};
    BlockMemory memory{};
    DeviceArray<Instr> instrs;
    DeviceArray<Block> block_list;
    DeviceArray<Wait> waits;
    DeviceArray<Term> term_list;
    DeviceArray<Step> steps;
    DeviceArray<char> weights;
    DeviceArray<uint32_t> counters;
#if defined(FASTVQ_TRACE)
    int64_t* trace = nullptr;
    Program program;
#endif
};

StepEngine::StepEngine(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output,
                       StepShape shape, const EngineSettings& settings) {
    const OnDevice on(settings.device);
    if (attribute(cudaDevAttrCooperativeLaunch, settings.device) == 0) {
        throw std::runtime_error("the device cannot launch blocks that wait for each other (cooperative launch)");
    }
    const int64_t multiprocessors = attribute(cudaDevAttrMultiProcessorCount, settings.device);
    const int64_t most_shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, settings.device);
    if (settings.shared_limit < 0 || settings.shared_limit > most_shared) {
        throw std::invalid_argument("shared_limit: expected 0 to " + std::to_string(most_shared) + " bytes, got " +
                                    std::to_string(settings.shared_limit));
    }
    if (settings.blocks < 0) throw std::invalid_argument("blocks: expected 0 or more");
    // The most there is, whatever this engine needs: the limit belongs to the kernel, and engines share that.
    check_call(cudaFuncSetAttribute(step_kernel(), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(most_shared)),
               "cudaFuncSetAttribute");
    ProgramOptions options{};
    // One block has a multiprocessor to itself. More would share its memory and meet more often.
    options.blocks = settings.blocks > 0 ? settings.blocks : multiprocessors;
    options.shared_limit = settings.shared_limit > 0 ? settings.shared_limit : most_shared;
    options.bf16 = settings.bf16;
    Program program = make_program(ops, terms, output, shape, options);
    const int64_t resident = resident_blocks(program.shared_bytes, multiprocessors);
    const int64_t wanted = static_cast<int64_t>(program.blocks.size());
    if (wanted > resident) {
        throw std::invalid_argument("blocks: the device holds " + std::to_string(resident) + " blocks of " +
                                    std::to_string(program.shared_bytes) + " bytes at once, not " +
                                    std::to_string(wanted));
    }
    auto state = std::make_unique<State>();
    state->device = settings.device;
    state->ops = ops;
    state->terms = terms;
    for (OpSpec& op : state->ops) op.weights = nullptr;
    for (TermSpec& term : state->terms) term.weights = nullptr;
    state->shape = shape;
    state->layout = program.layout;
    state->finished_counter = program.finished_counter;
    state->blocks = wanted;
    state->weight_bytes = static_cast<int64_t>(program.weights.size());
    for (const Block& block : program.blocks) {
        state->stationary_bytes += block.stationary_bytes;
        state->most_instrs = std::max<int64_t>(state->most_instrs, block.last_instr - block.first_instr);
        state->most_waits = std::max<int64_t>(state->most_waits, block.last_wait - block.first_wait);
    }
    state->memory = program.memory;
    state->shared_bytes = program.shared_bytes;
    state->instrs = upload(program.instrs);
    state->block_list = upload(program.blocks);
    state->waits = upload(program.waits);
    state->term_list = upload(program.terms);
    state->steps = upload(program.steps);
    state->weights = upload(program.weights);
    const std::size_t num_counters = counter_place(program.num_counters, 0);
    state->counters = allocate<uint32_t>(num_counters);
    state->counter_bytes = num_counters * sizeof(uint32_t);
#if defined(FASTVQ_TRACE)
    state->program = program;
#endif
    // Copies from pageable memory may still be on their way to the device when they return, and rows run on other
    // streams.
    check_call(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
    state_ = state.release();
}

StepEngine::~StepEngine() {
    try {
        const OnDevice on(state_->device);
        delete state_;
    } catch (const std::exception&) {
        // The runtime is gone, at the end of the process, and the device's memory with it.
    }
}

void StepEngine::run_row(const RowLaunch& launch) const {
    const State& state = *state_;
    check_views(launch.host_views, launch.host_views + num_ops());
    if (launch.row < 0 || launch.row >= state.shape.positions / state.shape.width) {
        throw std::invalid_argument("row: expected a row of the grid, got " + std::to_string(launch.row));
    }
    StepArgs args{};
    args.instrs = state.instrs.get();
    args.blocks = state.block_list.get();
    args.waits = state.waits.get();
    args.terms = state.term_list.get();
    args.steps = state.steps.get();
    args.weights = state.weights.get();
    args.counters = state.counters.get();
    args.finished_counter = state.finished_counter;
    args.layout = state.layout;
    args.stationary_bytes = state.shared_bytes - state.memory.bytes;
    args.memory = state.memory;
    args.values = launch.device_views;
    args.starts = launch.device_views + num_ops();
    args.batch = static_cast<int32_t>(state.shape.batch);
    args.width = static_cast<int32_t>(state.shape.width);
    args.num_codes = static_cast<int32_t>(state.shape.num_codes);
    args.key_stride = state.shape.key_stride;
    args.row = static_cast<int32_t>(launch.row);
    args.codes = launch.codes;
    args.code_stride = launch.code_stride;
    args.uniforms = launch.uniforms;
    args.uniform_stride = launch.uniform_stride;
    args.known = launch.known;
    args.known_stride = launch.known_stride;
    args.temperature = launch.draw.temperature;
    args.top_k = static_cast<int32_t>(launch.draw.top_k);
    args.top_p = launch.draw.top_p;
    args.status = launch.status;
#if defined(FASTVQ_TRACE)
    args.trace = state.trace;
    args.traced_instrs = static_cast<int32_t>(state.most_instrs);
#endif
    const OnDevice on(state.device);
    check_call(cudaMemsetAsync(state.counters.get(), 0, state.counter_bytes, launch.stream), "cudaMemsetAsync");
    check_call(launch_step(args, blocks(), state.shared_bytes, launch.stream), "cudaLaunchCooperativeKernel");
}

void StepEngine::check_views(const DeviceView* values, const DeviceView* starts) const {
    const std::vector<OpSpec>& ops = state_->ops;
    fastvq::check_views(ops, state_->terms, values, starts);
    for (int64_t index = 0; index < num_ops(); ++index) {
        const OpSpec& op = ops[index];
        if (op.level < 0) continue;
        const int64_t mask = values[index].column_mask;
        if (op.kind != Kind::kStoreKeys && state_->shape.width > 1) {
            // Blocks may be a column apart, so the vectors of two columns must not lie in one place.
            require((mask == 1 || mask == -1) && values[index].column_stride != 0, index,
                    "its values need two places or one for each column");
        }
        if (has_start(op)) {
            require(starts[index].column_mask == 0 || starts[index].column_mask == -1, index,
                    "a start needs a mask of 0 or -1");
        }
        for (int64_t t = op.first_term; op.kind == Kind::kAffine && t < op.first_term + op.num_terms; ++t) {
            const TermSpec& term = state_->terms[t];
            require(term.first_column == 0 || values[term.source].column_mask == -1, index,
                    "columns of a source are not kept");
        }
        require(op.kind != Kind::kAttend || values[op.sources[2]].column_mask == -1, index,
                "values to attend to are not kept");
    }
}

#if defined(FASTVQ_TRACE)
void StepEngine::set_trace(int64_t* times) { state_->trace = times; }
std::vector<Instr> StepEngine::program(int block) const {
    const Block& part = state_->program.blocks.at(block);
    const auto first = state_->program.instrs.begin();
    return {first + part.first_instr, first + part.last_instr};
}
#endif

int64_t StepEngine::weight_bytes() const { return state_->weight_bytes; }
int64_t StepEngine::stationary_bytes() const { return state_->stationary_bytes; }
int StepEngine::blocks() const { return static_cast<int>(state_->blocks); }
int64_t StepEngine::instructions() const { return state_->most_instrs; }
int64_t StepEngine::waits() const { return state_->most_waits; }
int64_t StepEngine::shared_bytes() const { return state_->shared_bytes; }
const StepShape& StepEngine::shape() const { return state_->shape; }
int64_t StepEngine::num_ops() const { return static_cast<int64_t>(state_->ops.size()); }

}  // namespace fastvq::cuda

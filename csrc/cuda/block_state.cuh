// What a block knows of its program.
#pragma once

#include "cuda/device.h"
#include "cuda/step_kernel.h"

namespace fastvq::cuda {

struct BlockState {
    // In shared memory; instructions count waits, terms and steps from the block's first.
    const Instr* instrs;
    const HeldStep* steps;
    const HeldTerm* terms;
    const Wait* waits;
    const char* stationary;
    char* work;
    float* planes;
    Segment* segments;
    int column;
};

FASTVQ_DEVICE const HeldStep* steps_of(const BlockState& state, const Instr& instr) {
    return state.steps + instr.first_step;
}

// The vector of sample b at data + b * batch_stride.
FASTVQ_DEVICE float* vectors_at(const DeviceView& view, int column) {
    return view.data + (int64_t{column} & view.column_mask) * view.column_stride;
}

template <class T>
FASTVQ_DEVICE void copy_words(T* to, const T* from, int count) {
    static_assert(sizeof(T) % 4 == 0);
    for (int word = threadIdx.x; word < count * static_cast<int>(sizeof(T) / 4); word += kThreads) {
        reinterpret_cast<uint32_t*>(to)[word] = reinterpret_cast<const uint32_t*>(from)[word];
    }
}

// A term that `samples` samples are read of at a time.
FASTVQ_DEVICE HeldTerm hold_term(Term term, const DeviceView* values, int samples) {
    const DeviceView view = values[term.op];
    term.rounded = term.rounded && view.column_mask == 1;
    const int wide_bits = term.rounded ? 3 : 2;
    // With two places a whole number of vectors lies between them, in either type.
    const int64_t together = view.batch_stride | view.column_stride | term.begin | term.depth;
    const bool wide = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && (together & ((1 << wide_bits) - 1)) == 0;
    const int vector_bits = wide ? wide_bits : 0;
    // All threads for one sample, at most a warp for each of many.
    const int most = bits_for(kThreads) - smaller(bits_for(kThreads), bits_for(samples));
    const int lane_bits = larger(most, smaller(5, bits_for(term.depth >> vector_bits)));
    return {view, term, vector_bits, lane_bits};
}

// Copies the block's part of the program behind its weights. A barrier has to follow.
FASTVQ_DEVICE BlockState hold_program(const StepArgs& args, const Block& block, char* shared) {
    char* memory = shared + args.stationary_bytes;
    char* program = memory + args.memory.program;
    const HeldProgram held = held_program(block);
    auto* instrs = reinterpret_cast<Instr*>(program);
    auto* steps = reinterpret_cast<HeldStep*>(program + held.steps);
    auto* terms = reinterpret_cast<HeldTerm*>(program + held.terms);
    auto* waits = reinterpret_cast<Wait*>(program + held.waits);
    for (int i = threadIdx.x; i < block.last_instr - block.first_instr; i += kThreads) {
        Instr instr = args.instrs[block.first_instr + i];
        instr.first_wait -= block.first_wait;
        instr.first_term -= block.first_term;
        instr.first_step -= block.first_step;
        instrs[i] = instr;
    }
    copy_words(waits, args.waits + block.first_wait, block.last_wait - block.first_wait);
    for (int s = threadIdx.x; s < block.last_step - block.first_step; s += kThreads) {
        Step step = args.steps[block.first_step + s];
        const DeviceView view = (step.starts ? args.starts : args.values)[step.op];
        if (step.stores == Stores::kRounded && view.column_mask != 1) step.stores = Stores::kFloats;
        if (step.stores == Stores::kRows && view.column_mask == -1) step.stores = Stores::kFloats;
        steps[s] = {view, step};
    }
    const int samples = samples_at_once(args.batch);
    for (int t = threadIdx.x; t < block.last_term - block.first_term; t += kThreads) {
        terms[t] = hold_term(args.terms[block.first_term + t], args.values, samples);
    }
    return {instrs, steps, terms, waits, shared, memory, reinterpret_cast<float*>(memory + args.memory.planes),
            reinterpret_cast<Segment*>(memory + args.memory.segments), 0};
}

// By other warps than the one that waits, if there are any.
FASTVQ_DEVICE void find_segments(const BlockState& state, const Instr& instr) {
    for (int t = kThreads - 1 - static_cast<int>(threadIdx.x); t < instr.num_terms; t += kThreads) {
        const HeldTerm& held = state.terms[instr.first_term + t];
        const Term& term = held.term;
        const float* place = vectors_at(held.view, state.column + term.first_column);
        const int64_t skipped = place - held.view.data;
        const void* data = term.rounded ? reinterpret_cast<const uint16_t*>(held.view.data) + skipped
                                        : static_cast<const void*>(place);
        state.segments[t] = {data,         held.view.batch_stride, term.begin,    term.begin + term.depth,
                             term.rounded, held.vector_bits,       held.lane_bits};
    }
}

}  // namespace fastvq::cuda

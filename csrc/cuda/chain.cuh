// What is done channel by channel: the steps of an instruction, which a thread works through for one channel of one
// sample after the other.
#pragma once

#include <cmath>

#include "cuda/block_state.cuh"

namespace fastvq::cuda {

FASTVQ_DEVICE float elu(float x) { return x > 0.0f ? x : expm1f(x); }
FASTVQ_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Partial sums of a product, which all threads have written.
struct Sums {
    const float* memory;
    int parts, rows, columns;
    bool fragments;

    // With fragments the four registers of a lane belong to two neighbouring samples: samples and columns change places
    // a little, so that a warp writes to all banks. `rows` is a multiple of 8 then, `columns` one of 16.
    FASTVQ_DEVICE int place(int part, int sample, int column) const {
        if (!fragments) return (part * rows + sample) * columns + column;
        const int row = (sample & ~7) | (sample >> 1 & 3) | (sample & 1) << 2;
        return ((part * (columns / 16) + column / 16) * rows + row) * 16 + ((column & 15) ^ ((sample >> 2 & 1) * 8));
    }
    FASTVQ_DEVICE float total(float start, int sample, int column) const {
        for (int part = 0; part < parts; ++part) start += memory[place(part, sample, column)];
        return start;
    }
};

// One channel of one sample of a slice; `row` counts samples worked on at a time.
struct Item {
    int sample, row, c;
};

struct Pair {
    float first, second;
};

FASTVQ_DEVICE float& plane(const BlockState& state, int index) { return state.planes[index * kThreads + threadIdx.x]; }

FASTVQ_DEVICE Pair read_planes(const BlockState& state, const int32_t (&planes)[2]) {
    return {plane(state, planes[0]), planes[1] >= 0 ? plane(state, planes[1]) : 0.0f};
}

// Steps [first, last), all of which load.
FASTVQ_DEVICE void load_planes(const BlockState& state, const Instr& instr, int first, int last, const Item& item) {
    constexpr int kAtOnce = 4;  // steps whose loads are on their way together
    const HeldStep* steps = steps_of(state, instr);
    for (int base = first; base < last; base += kAtOnce) {
        Pair loaded[kAtOnce] = {};
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            if (base + i >= last) continue;
            const HeldStep& held = steps[base + i];
            const float* from =
                vectors_at(held.view, state.column) + item.sample * held.view.batch_stride + instr.first + item.c;
            loaded[i].first = load_shared_state(from);
            if (held.step.planes[1] >= 0) loaded[i].second = load_shared_state(from + held.step.half);
        }
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            if (base + i >= last) continue;
            const Step& step = steps[base + i].step;
            plane(state, step.planes[0]) = loaded[i].first;
            if (step.planes[1] >= 0) plane(state, step.planes[1]) = loaded[i].second;
        }
    }
}

FASTVQ_DEVICE Item item_of(const Instr& instr, int first_sample, int item) {
    const int row = item / instr.count;
    return {first_sample + row, row, item - row * instr.count};
}

// Of the first item of every thread, what needs no wait.
FASTVQ_DEVICE void load_early(const StepArgs& args, const BlockState& state, const Instr& instr) {
    if (instr.num_early == 0) return;
    const int items = smaller(samples_at_once(args.layout, args.batch), args.batch) * instr.count;
    if (static_cast<int>(threadIdx.x) < items) {
        load_planes(state, instr, 0, instr.num_early, item_of(instr, 0, threadIdx.x));
    }
}

FASTVQ_DEVICE Pair look_up(const StepArgs& args, const BlockState& state, const Instr& instr, const Step& step,
                           const Item& item, Pair sum) {
    constexpr int kAtOnce = 4;  // taps whose codes are on their way together
    const int halves = step.planes[1] >= 0 ? 2 : 1, width = halves * instr.count, taps = step.num_taps;
    const auto* table = reinterpret_cast<const float*>(args.weights + step.weights) + item.c;
    const int64_t* codes = args.codes + item.sample * args.code_stride + state.column - taps;
    const int first_tap = larger(0, taps - state.column);  // the ones before stand left of the grid
    for (int tap = first_tap; tap < taps; tap += kAtOnce) {
        int64_t code[kAtOnce];
        Pair part[kAtOnce];
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) code[i] = tap + i < taps ? load_shared_state(codes + tap + i) : 0;
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            if (tap + i >= taps) continue;
            const float* entry = table + (int64_t{tap + i} * args.num_codes + code[i]) * width;
            part[i] = {entry[0], halves == 2 ? entry[instr.count] : 0.0f};
        }
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            if (tap + i >= taps) continue;
            sum.first += part[i].first;
            sum.second += part[i].second;
        }
    }
    return sum;
}

FASTVQ_DEVICE Pair result_of(const StepArgs& args, const BlockState& state, const Instr& instr, const Step& step,
                             const Sums& sums, const Item& item) {
    const Pair x = read_planes(state, step.sources[0]);
    switch (step.code) {
        case StepCode::kSum:
            return {sums.total(x.first, item.row, item.c),
                    step.planes[1] >= 0 ? sums.total(x.second, item.row, instr.count + item.c) : 0.0f};
        case StepCode::kLookup:
            return look_up(args, state, instr, step, item, x);
        case StepCode::kElu:
            return {elu(x.first), elu(x.second)};
        case StepCode::kConcatElu:
            return {elu(x.first), elu(-x.first)};
        case StepCode::kRelu:  // keeps NaN
            return {x.first < 0.0f ? 0.0f : x.first, x.second < 0.0f ? 0.0f : x.second};
        case StepCode::kAdd: {
            const Pair y = read_planes(state, step.sources[1]);
            return {x.first + y.first, x.second + y.second};
        }
        case StepCode::kGlu:
            return {x.first * sigmoid(x.second), 0.0f};
        case StepCode::kTanh:
            return {tanhf(x.first) * sigmoid(x.second), 0.0f};
        default:
            return x;
    }
}

FASTVQ_DEVICE void store_result(const StepArgs& args, const BlockState& state, const Instr& instr, const HeldStep& held,
                                const Item& item, Pair result) {
    const Step& step = held.step;
    const DeviceView& view = held.view;
    const int channel = instr.first + item.c;
    const int64_t vector = item.sample * view.batch_stride;
    if (step.code == StepCode::kStoreKeys) {
        // Keys lie one channel after the other, so that scores of consecutive positions lie side by side.
        float* out = view.data + vector + int64_t{args.row} * args.width + state.column;
        store_shared_state(out + channel * args.key_stride, result.first);
        if (step.sources[0][1] >= 0) store_shared_state(out + (step.half + channel) * args.key_stride, result.second);
        return;
    }
    if (step.stores == Stores::kRows) return;
    const bool two = step.planes[1] >= 0;
    const int64_t place = vectors_at(view, state.column) - view.data + vector + channel;
    if (step.stores == Stores::kRounded) {
        auto* out = reinterpret_cast<uint16_t*>(view.data) + place;
        store_shared_state(out, static_cast<uint16_t>(pack_bf16(result.first, 0.0f)));
        if (two) store_shared_state(out + step.half, static_cast<uint16_t>(pack_bf16(result.second, 0.0f)));
    } else {
        store_shared_state(view.data + place, result.first);
        if (two) store_shared_state(view.data + place + step.half, result.second);
    }
}

// The samples [first_sample, first_sample + rows).
FASTVQ_DEVICE void chain(const StepArgs& args, const BlockState& state, const Instr& instr, const Sums& sums,
                         int first_sample, int rows) {
    const HeldStep* steps = steps_of(state, instr);
    for (int number = threadIdx.x; number < rows * instr.count; number += kThreads) {
        const Item item = item_of(instr, first_sample, number);
        const bool begun = first_sample == 0 && number == static_cast<int>(threadIdx.x);
        load_planes(state, instr, begun ? instr.num_early : 0, instr.num_loads, item);
        for (int s = instr.num_loads; s < instr.num_steps; ++s) {
            const Step& step = steps[s].step;
            const Pair result = result_of(args, state, instr, step, sums, item);
            if (step.planes[0] >= 0) plane(state, step.planes[0]) = result.first;
            if (step.planes[1] >= 0) plane(state, step.planes[1]) = result.second;
            store_result(args, state, instr, steps[s], item, result);
        }
    }
}

}  // namespace fastvq::cuda

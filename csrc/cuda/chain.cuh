// What is done channel by channel: the steps of an instruction, which a thread works through for a few channels of
// samples at a time.
#pragma once

#include <cmath>

#include "cuda/block_state.cuh"

namespace fastvq::cuda {

FASTVQ_DEVICE float elu(float x) { return x > 0.0f ? x : expm1f(x); }
FASTVQ_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN
FASTVQ_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

struct Pair {
    float first, second;
};

// Items that a thread works on at a time, each a channel of a sample of the slice; `row` counts samples from the first.
// The first one is `wanted`. Those that are not are computed in its place and stored nowhere.
template <int kItems>
struct Items {
    int first_sample;
    int row[kItems], c[kItems];
    bool wanted[kItems];
};

// Those from `number` on, kThreads apart, of `rows` samples.
template <int kItems>
FASTVQ_DEVICE Items<kItems> items_of(const Instr& instr, int first_sample, int rows, int number) {
    Items<kItems> items;
    items.first_sample = first_sample;
    int row = rows == 1 ? 0 : number / instr.count, c = number - row * instr.count;
    FASTVQ_UNROLL
    for (int i = 0; i < kItems; ++i) {
        items.wanted[i] = row < rows;
        items.row[i] = items.wanted[i] ? row : items.row[0];
        items.c[i] = items.wanted[i] ? c : items.c[0];
        row += instr.next_row;
        c += instr.next_channel;
        if (c >= instr.count) {
            c -= instr.count;
            ++row;
        }
    }
    return items;
}

// Partial sums of a product, which all threads have written.
struct Sums {
    const float* memory;
    int parts, rows, columns;  // rows are a multiple of 8, columns of 16

    // The four registers of a lane belong to two neighbouring samples: samples and columns change places a little, so
    // that a warp writes to all banks.
    FASTVQ_DEVICE int place(int part, int sample, int column) const {
        const int row = (sample & ~7) | (sample >> 1 & 3) | (sample & 1) << 2;
        return ((part * (columns / 16) + column / 16) * rows + row) * 16 + ((column & 15) ^ ((sample >> 2 & 1) * 8));
    }

    // Adds to the first of each pair, and to the second from `half` columns on.
    template <int kItems>
    FASTVQ_DEVICE void add(const Items<kItems>& items, int half, bool two, Pair (&totals)[kItems]) const {
        constexpr int kAtOnce = kItems > 1 ? 4 : 8;
        const int stride = rows * columns;  // between parts
        FASTVQ_UNROLL
        for (int h = 0; h < 2; ++h) {
            if (h == 1 && !two) continue;
            int places[kItems];
            FASTVQ_UNROLL
            for (int i = 0; i < kItems; ++i) places[i] = place(0, items.row[i], items.c[i] + h * half);
            FASTVQ_ROLLED
            for (int part = 0; part < parts; part += kAtOnce) {
                float numbers[kAtOnce][kItems] = {};
                FASTVQ_UNROLL
                for (int p = 0; p < kAtOnce; ++p) {
                    if (part + p >= parts) continue;
                    FASTVQ_UNROLL
                    for (int i = 0; i < kItems; ++i) numbers[p][i] = memory[places[i] + (part + p) * stride];
                }
                FASTVQ_UNROLL
                for (int p = 0; p < kAtOnce; ++p) {
                    if (part + p >= parts) continue;
                    FASTVQ_UNROLL
                    for (int i = 0; i < kItems; ++i) {
                        float& total = h == 0 ? totals[i].first : totals[i].second;
                        total += numbers[p][i];
                    }
                }
            }
        }
    }
};

template <int kItems>
FASTVQ_DEVICE float& plane(const BlockState& state, int index, int i) {
    return state.planes[(index * kItems + i) * kThreads + threadIdx.x];
}

template <int kItems>
FASTVQ_DEVICE void write_planes(const BlockState& state, const int32_t (&planes)[2], const Pair (&values)[kItems]) {
    if (planes[0] < 0) return;
    FASTVQ_UNROLL
    for (int i = 0; i < kItems; ++i) plane<kItems>(state, planes[0], i) = values[i].first;
    if (planes[1] < 0) return;
    FASTVQ_UNROLL
    for (int i = 0; i < kItems; ++i) plane<kItems>(state, planes[1], i) = values[i].second;
}

template <int kItems>
FASTVQ_DEVICE void read_planes(const BlockState& state, const int32_t (&planes)[2], Pair (&values)[kItems]) {
    FASTVQ_UNROLL
    for (int i = 0; i < kItems; ++i) values[i].first = plane<kItems>(state, planes[0], i);
    if (planes[1] < 0) return;
    FASTVQ_UNROLL
    for (int i = 0; i < kItems; ++i) values[i].second = plane<kItems>(state, planes[1], i);
}

// Steps [first, last), all of which load.
template <int kItems>
FASTVQ_DEVICE void load_planes(const BlockState& state, const Instr& instr, int first, int last,
                               const Items<kItems>& items) {
    constexpr int kAtOnce = kItems > 1 ? 4 : 8;  // steps whose loads are on their way together
    const HeldStep* steps = steps_of(state, instr);
    FASTVQ_ROLLED
    for (int base = first; base < last; base += kAtOnce) {
        Pair loaded[kAtOnce][kItems] = {};
        FASTVQ_UNROLL
        for (int s = 0; s < kAtOnce; ++s) {
            if (base + s >= last) continue;
            const HeldStep& held = steps[base + s];
            const float* from = vectors_at(held.view, state.column) + instr.first;
            const int64_t stride = held.view.batch_stride;
            const bool two = held.step.planes[1] >= 0;
            FASTVQ_UNROLL
            for (int i = 0; i < kItems; ++i) {
                const float* place = from + (items.first_sample + items.row[i]) * stride + items.c[i];
                loaded[s][i].first = load_shared_state(place);
                if (two) loaded[s][i].second = load_shared_state(place + held.step.half);
            }
        }
        FASTVQ_UNROLL
        for (int s = 0; s < kAtOnce; ++s) {
            if (base + s < last) write_planes<kItems>(state, steps[base + s].step.planes, loaded[s]);
        }
    }
}

// Of the first items of every thread, what needs no wait.
FASTVQ_DEVICE void load_early(const StepArgs& args, const BlockState& state, const Instr& instr) {
    if (instr.num_early == 0) return;
    const int rows = samples_at_once(args.batch);
    if (instr.many_items) {
        load_planes(state, instr, 0, instr.num_early, items_of<kManyItems>(instr, 0, rows, threadIdx.x));
    } else if (static_cast<int>(threadIdx.x) < rows * instr.count) {
        load_planes(state, instr, 0, instr.num_early, items_of<1>(instr, 0, rows, threadIdx.x));
    }
}

// Adds the entries of a table.
template <int kItems>
FASTVQ_DEVICE void look_up(const StepArgs& args, const BlockState& state, const Instr& instr, const Step& step,
                           const Items<kItems>& items, Pair (&sums)[kItems]) {
    constexpr int kAtOnce = kItems > 1 ? 1 : 4;  // taps whose codes are on their way together
    const bool two = step.planes[1] >= 0;
    const int width = two ? 2 * instr.count : instr.count, taps = step.num_taps;
    const auto* table = reinterpret_cast<const float*>(args.weights + step.weights);
    const int64_t* codes = args.codes + state.column - taps;
    const int first_tap = larger(0, taps - state.column);  // the ones before stand left of the grid
    FASTVQ_ROLLED
    for (int tap = first_tap; tap < taps; tap += kAtOnce) {
        int64_t code[kAtOnce][kItems];
        Pair part[kAtOnce][kItems] = {};
        FASTVQ_UNROLL
        for (int t = 0; t < kAtOnce; ++t) {
            FASTVQ_UNROLL
            for (int i = 0; i < kItems; ++i) {
                const int64_t* place = codes + (items.first_sample + items.row[i]) * args.code_stride + tap + t;
                code[t][i] = tap + t < taps ? load_shared_state(place) : 0;
            }
        }
        FASTVQ_UNROLL
        for (int t = 0; t < kAtOnce; ++t) {
            if (tap + t >= taps) continue;
            FASTVQ_UNROLL
            for (int i = 0; i < kItems; ++i) {
                const float* entry = table + (int64_t{tap + t} * args.num_codes + code[t][i]) * width + items.c[i];
                part[t][i] = {entry[0], two ? entry[instr.count] : 0.0f};
            }
        }
        FASTVQ_UNROLL
        for (int t = 0; t < kAtOnce; ++t) {
            if (tap + t >= taps) continue;
            FASTVQ_UNROLL
            for (int i = 0; i < kItems; ++i) {
                sums[i].first += part[t][i].first;
                sums[i].second += part[t][i].second;
            }
        }
    }
}

// values = f(values), of the second ones if there are `two`.
template <int kItems, class Function>
FASTVQ_DEVICE void each(Pair (&values)[kItems], bool two, const Function& f) {
    FASTVQ_UNROLL
    for (int i = 0; i < kItems; ++i) values[i].first = f(values[i].first);
    if (!two) return;
    FASTVQ_UNROLL
    for (int i = 0; i < kItems; ++i) values[i].second = f(values[i].second);
}

// Takes the first source of a step for its result.
template <int kItems>
FASTVQ_DEVICE void compute(const StepArgs& args, const BlockState& state, const Instr& instr, const Step& step,
                           const Sums& sums, const Items<kItems>& items, Pair (&x)[kItems]) {
    const bool two = step.planes[1] >= 0;
    switch (step.code) {
        case StepCode::kSum:
            sums.add(items, instr.count, two, x);
            break;
        case StepCode::kLookup:
            look_up(args, state, instr, step, items, x);
            break;
        case StepCode::kConcatElu:
            FASTVQ_UNROLL
            for (int i = 0; i < kItems; ++i) x[i].second = -x[i].first;
            [[fallthrough]];
        case StepCode::kElu:
            each(x, two, [](float value) { return elu(value); });
            break;
        case StepCode::kRelu:
            each(x, two, [](float value) { return relu(value); });
            break;
        case StepCode::kAdd: {
            Pair y[kItems] = {};
            read_planes(state, step.sources[1], y);
            FASTVQ_UNROLL
            for (int i = 0; i < kItems; ++i) x[i] = {x[i].first + y[i].first, x[i].second + y[i].second};
            break;
        }
        case StepCode::kGlu:
            FASTVQ_UNROLL
            for (int i = 0; i < kItems; ++i) x[i] = {x[i].first * sigmoid(x[i].second), 0.0f};
            break;
        case StepCode::kTanh:
            FASTVQ_UNROLL
            for (int i = 0; i < kItems; ++i) x[i] = {tanhf(x[i].first) * sigmoid(x[i].second), 0.0f};
            break;
        default:
            break;
    }
}

template <int kItems>
FASTVQ_DEVICE void store_results(const StepArgs& args, const BlockState& state, const Instr& instr,
                                 const HeldStep& held, const Items<kItems>& items, const Pair (&results)[kItems]) {
    const Step& step = held.step;
    const DeviceView& view = held.view;
    const bool keys = step.code == StepCode::kStoreKeys;
    if (!keys && step.stores == Stores::kRows) return;
    // Keys lie one channel after the other, so that scores of consecutive positions lie side by side.
    const int64_t column = keys ? int64_t{args.row} * args.width + state.column
                                : vectors_at(view, state.column) - view.data;
    const int64_t spacing = keys ? args.key_stride : 1, half = step.half * spacing;
    const bool two = (keys ? step.sources[0][1] : step.planes[1]) >= 0;
    FASTVQ_UNROLL
    for (int i = 0; i < kItems; ++i) {
        if (!items.wanted[i]) continue;
        const int64_t place = column + (items.first_sample + items.row[i]) * view.batch_stride +
                              (instr.first + items.c[i]) * spacing;
        if (step.stores == Stores::kRounded) {
            auto* out = reinterpret_cast<uint16_t*>(view.data) + place;
            store_shared_state(out, static_cast<uint16_t>(pack_bf16(results[i].first, 0.0f)));
            if (two) store_shared_state(out + half, static_cast<uint16_t>(pack_bf16(results[i].second, 0.0f)));
        } else {
            store_shared_state(view.data + place, results[i].first);
            if (two) store_shared_state(view.data + place + half, results[i].second);
        }
    }
}

// The items from `number` on.
template <int kItems>
FASTVQ_DEVICE void chain_items(const StepArgs& args, const BlockState& state, const Instr& instr, const Sums& sums,
                               int first_sample, int rows, int number) {
    const HeldStep* steps = steps_of(state, instr);
    const Items<kItems> items = items_of<kItems>(instr, first_sample, rows, number);
    const bool begun = first_sample == 0 && number == static_cast<int>(threadIdx.x);
    load_planes(state, instr, begun ? instr.num_early : 0, instr.num_loads, items);
    Pair values[kItems] = {};
    HeldStep next = steps[instr.num_loads];
    FASTVQ_ROLLED
    for (int s = instr.num_loads; s < instr.num_steps; ++s) {
        const HeldStep held = next;
        next = steps[smaller(s + 1, instr.num_steps - 1)];
        if (!held.step.forwarded) read_planes(state, held.step.sources[0], values);
        compute(args, state, instr, held.step, sums, items, values);
        write_planes<kItems>(state, held.step.planes, values);
        store_results(args, state, instr, held, items, values);
    }
}

// The samples [first_sample, first_sample + rows).
FASTVQ_DEVICE void chain(const StepArgs& args, const BlockState& state, const Instr& instr, const Sums& sums,
                         int first_sample, int rows) {
    const int count = rows * instr.count;
    if (instr.many_items) {
        for (int number = threadIdx.x; number < count; number += kManyItems * kThreads) {
            chain_items<kManyItems>(args, state, instr, sums, first_sample, rows, number);
        }
    } else {
        for (int number = threadIdx.x; number < count; number += kThreads) {
            chain_items<1>(args, state, instr, sums, first_sample, rows, number);
        }
    }
}

}  // namespace fastvq::cuda

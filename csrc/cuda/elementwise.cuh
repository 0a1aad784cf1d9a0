// Look-ups and what is done channel by channel.
#pragma once

#include <cmath>

#include "cuda/block_state.cuh"

namespace fastvq::cuda {

FASTVQ_DEVICE float elu(float x) { return x > 0.0f ? x : expm1f(x); }
FASTVQ_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// A source of `halves` halves, read on the slice of the instruction.
struct Input {
    const float* kept;  // if it is the last result of the same task
    Place place;
    int halves;
};

FASTVQ_DEVICE Input input_of(const BlockState& state, const Instr& instr, int which, int halves) {
    const bool kept = state.kept_op >= 0 && state.kept_op == instr.sources[which] && state.kept_first == instr.first &&
                      state.kept_count == instr.count && state.kept_halves == halves;
    return {kept ? state.kept + (state.turn ^ 1) * kKept : nullptr, state.prepared->sources[which], halves};
}

FASTVQ_DEVICE float read(const Input& input, const Instr& instr, int sample, int half, int c) {
    if (input.kept) return input.kept[(sample * input.halves + half) * instr.count + c];
    return load_shared_state(input.place.data + sample * input.place.stride + instr.first + half * instr.half + c);
}

// Results of the two halves of x (and y) of one channel.
FASTVQ_DEVICE void apply(Code code, const float (&x)[2], const float (&y)[2], float (&out)[2]) {
    switch (code) {
        case Code::kElu:
            out[0] = elu(x[0]);
            out[1] = elu(x[1]);
            break;
        case Code::kConcatElu:
            out[0] = elu(x[0]);
            out[1] = elu(-x[0]);
            break;
        case Code::kRelu:  // keeps NaN
            out[0] = x[0] < 0.0f ? 0.0f : x[0];
            out[1] = x[1] < 0.0f ? 0.0f : x[1];
            break;
        case Code::kAdd:
            out[0] = x[0] + y[0];
            out[1] = x[1] + y[1];
            break;
        case Code::kGlu:
            out[0] = x[0] * sigmoid(x[1]);
            break;
        case Code::kTanh:
            out[0] = tanhf(x[0]) * sigmoid(x[1]);
            break;
        default:
            break;
    }
}

FASTVQ_DEVICE void elementwise(const StepArgs& args, BlockState& state) {
    constexpr int kAtOnce = 4;  // channels of a thread whose loads are on their way together
    const Instr instr = state.prepared->instr;
    const bool gate = instr.code == Code::kGlu || instr.code == Code::kTanh, sum = instr.code == Code::kAdd;
    const int read_halves = gate ? 2 : instr.code == Code::kConcatElu ? 1 : instr.halves;
    const Input first = input_of(state, instr, 0, read_halves);
    const Input second = sum ? input_of(state, instr, 1, read_halves) : first;
    const Output output = output_of(state, instr, args.batch);
    const int items = args.batch * instr.count;
    for (int base = threadIdx.x; base < items; base += kAtOnce * kThreads) {
        float x[kAtOnce][2] = {}, y[kAtOnce][2] = {};
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const int item = base + i * kThreads;
            if (item >= items) continue;
            const int sample = item / instr.count, c = item - sample * instr.count;
            x[i][0] = read(first, instr, sample, 0, c);
            if (read_halves == 2) x[i][1] = read(first, instr, sample, 1, c);
            if (sum) y[i][0] = read(second, instr, sample, 0, c);
            if (sum && read_halves == 2) y[i][1] = read(second, instr, sample, 1, c);
        }
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const int item = base + i * kThreads;
            if (item >= items) continue;
            const int sample = item / instr.count, c = item - sample * instr.count;
            float out[2] = {};
            apply(instr.code, x[i], y[i], out);
            output.write(sample, c, instr.first + c, out[0]);
            if (instr.halves == 2) output.write(sample, instr.count + c, instr.half + instr.first + c, out[1]);
        }
    }
    has_kept(state, instr, args.batch);
}

// Keys lie one channel after the other, so that scores of consecutive positions lie side by side.
FASTVQ_DEVICE void store_keys(const StepArgs& args, const BlockState& state) {
    const Instr instr = state.prepared->instr;
    const Input key = input_of(state, instr, 0, instr.halves);
    const Place out = state.prepared->out;
    const int width = instr.halves * instr.count;
    for (int item = threadIdx.x; item < args.batch * width; item += kThreads) {
        const int sample = item / width, c = item - sample * width;
        const int half = c < instr.count ? 0 : 1;
        const float value = read(key, instr, sample, half, c - half * instr.count);
        store_shared_state(out.data + sample * out.stride + slice_channel(instr, c) * args.key_stride, value);
    }
}

FASTVQ_DEVICE void lookup(const StepArgs& args, BlockState& state) {
    constexpr int kAtOnce = 4;  // taps whose codes are on their way together
    const Instr instr = state.prepared->instr;
    const Output output = output_of(state, instr, args.batch);
    const auto* table = reinterpret_cast<const float*>(args.weights + instr.weights);
    const int width = instr.halves * instr.count, taps = instr.num_taps;
    const int first_tap = larger(0, taps - state.column);  // the ones before stand left of the grid
    for (int item = threadIdx.x; item < args.batch * width; item += kThreads) {
        const int sample = item / width, c = item - sample * width, channel = slice_channel(instr, c);
        const int64_t* codes = args.codes + sample * args.code_stride + state.column - taps;
        float sum = output.start_of(sample, c, channel);
        for (int tap = first_tap; tap < taps; tap += kAtOnce) {
            int64_t code[kAtOnce];
            float part[kAtOnce];
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) code[i] = tap + i < taps ? load_shared_state(codes + tap + i) : 0;
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                if (tap + i < taps) part[i] = table[(int64_t{tap + i} * args.num_codes + code[i]) * width + c];
            }
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                if (tap + i < taps) sum += part[i];
            }
        }
        output.write(sample, c, channel, sum);
    }
    has_kept(state, instr, args.batch);
}

}  // namespace fastvq::cuda

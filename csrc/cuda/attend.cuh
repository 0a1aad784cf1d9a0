// One query against the positions so far, one sample and head at a time.
#pragma once

#include <cmath>

#include "cuda/block_state.cuh"

namespace fastvq::cuda {

// A number of every warp, the same in all of its lanes, made one of the block.
struct Largest {
    static constexpr float kNone = -INFINITY;
    FASTVQ_DEVICE static float of(float a, float b) { return b > a ? b : a; }
};
struct Sum {
    static constexpr float kNone = 0.0f;
    FASTVQ_DEVICE static float of(float a, float b) { return a + b; }
};

template <class Combine>
FASTVQ_DEVICE float over_block(float value, float* warps, Site site) {
    for (int mask = 1; mask < 32; mask *= 2) value = Combine::of(value, shuffle_xor(value, mask));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    block_barrier(site);
    value = Combine::kNone;
    for (int warp = 0; warp < kWarps; ++warp) value = Combine::of(value, warps[warp]);
    return value;
}

FASTVQ_DEVICE float score(const float* keys, int64_t key_stride, const float* query, int key_width) {
    constexpr int kAtOnce = 8;
    float sum = 0.0f;
    for (int d = 0; d < key_width; d += kAtOnce) {
        float key[kAtOnce];
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            key[i] = d + i < key_width ? load_shared_state(keys + (d + i) * key_stride) : 0.0f;
        }
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            if (d + i < key_width) sum = fmaf(query[d + i], key[i], sum);
        }
    }
    return sum;
}

// Sum of weights times one channel of the values at positions first, first + step, ..
FASTVQ_DEVICE float weigh(const float* values, int64_t stride, const float* weights, int first, int step, int count) {
    constexpr int kAtOnce = 8;
    float sum = 0.0f;
    for (int j = first; j < count; j += kAtOnce * step) {
        float value[kAtOnce];
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const int place = j + i * step;
            value[i] = place < count ? load_shared_state(values + place * stride) : 0.0f;
        }
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const int place = j + i * step;
            if (place < count) sum = fmaf(weights[place], value[i], sum);
        }
    }
    return sum;
}

FASTVQ_DEVICE void attend(const StepArgs& args, const BlockState& state) {
    const Prepared& prepared = *state.prepared;
    const Instr instr = prepared.instr;
    const int count = args.row * args.width + state.column + (instr.inclusive ? 1 : 0);
    const AttendWork work = attend_work(count, instr.key_width, instr.value_width);
    auto* scores = reinterpret_cast<float*>(state.work);
    auto* query = reinterpret_cast<float*>(state.work + work.query);
    auto* partials = reinterpret_cast<float*>(state.work + work.partials);
    auto* warps = reinterpret_cast<float*>(state.work + work.reduce);
    const float scale = 1.0f / sqrtf(static_cast<float>(instr.key_width));
    const int64_t value_stride = prepared.value_stride;
    for (int job = instr.first_job; job < instr.last_job; ++job) {
        const int sample = job / instr.heads, head = job - sample * instr.heads;
        float* out = prepared.out.data + sample * prepared.out.stride + head * instr.value_width;
        if (count == 0) {
            for (int e = threadIdx.x; e < instr.value_width; e += kThreads) store_shared_state(out + e, 0.0f);
            continue;
        }
        const Place from = prepared.sources[0];
        const float* vector = from.data + sample * from.stride + head * instr.key_width;
        for (int d = threadIdx.x; d < instr.key_width; d += kThreads) query[d] = load_shared_state(vector + d) * scale;
        block_barrier(Site::kAttendQuery);

        const float* keys = prepared.sources[1].data + sample * prepared.sources[1].stride +
                            head * instr.key_width * args.key_stride;
        float largest = Largest::kNone;
        for (int j = threadIdx.x; j < count; j += kThreads) {
            scores[j] = score(keys + j, args.key_stride, query, instr.key_width);
            largest = Largest::of(largest, scores[j]);
        }
        largest = over_block<Largest>(largest, warps, Site::kAttendMax);
        float total = 0.0f;
        for (int j = threadIdx.x; j < count; j += kThreads) {
            scores[j] = expf(scores[j] - largest);
            total += scores[j];
        }
        total = over_block<Sum>(total, warps + kWarps, Site::kAttendTotal);
        const float inverse = 1.0f / total;

        const float* values = prepared.sources[2].data + sample * prepared.sources[2].stride + head * instr.value_width;
        const int parts = work.splits * instr.value_width;
        for (int item = threadIdx.x; item < parts; item += kThreads) {
            const int part = item / instr.value_width, e = item - part * instr.value_width;
            partials[item] = weigh(values + e, value_stride, scores, part, work.splits, count);
        }
        block_barrier(Site::kAttendPartials);
        for (int e = threadIdx.x; e < instr.value_width; e += kThreads) {
            float sum = 0.0f;
            for (int part = 0; part < work.splits; ++part) sum += partials[part * instr.value_width + e];
            store_shared_state(out + e, sum * inverse);
        }
    }
}

}  // namespace fastvq::cuda

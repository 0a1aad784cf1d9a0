// Queries against the positions so far. How the warps of a block share the work: AttendWork.
#pragma once

#include <cmath>

#include "cuda/block_state.cuh"

namespace fastvq::cuda {

// What one head of one sample reads: keys of channel d and position j at keys[d * key_stride + j], values of position j
// at values[j * value_stride].
struct Head {
    const float* query;  // in shared memory, scaled
    const float *keys, *values;
    int64_t key_stride, value_stride;
    int key_width, value_width, count;
    bool wide_keys, wide_values;  // four at a time
};

// Four neighbours, zeros from `count` on.
template <bool kWide>
FASTVQ_DEVICE float4 load_four(const float* address, int count) {
    if constexpr (kWide) return load_shared_state(reinterpret_cast<const float4*>(address));
    return {count > 0 ? load_shared_state(address) : 0.0f, count > 1 ? load_shared_state(address + 1) : 0.0f,
            count > 2 ? load_shared_state(address + 2) : 0.0f, count > 3 ? load_shared_state(address + 3) : 0.0f};
}

// sums += factor * numbers.
FASTVQ_DEVICE void add_product(float4& sums, float factor, const float4& numbers) {
    sums.x = fmaf(factor, numbers.x, sums.x);
    sums.y = fmaf(factor, numbers.y, sums.y);
    sums.z = fmaf(factor, numbers.z, sums.z);
    sums.w = fmaf(factor, numbers.w, sums.w);
}

// Scores of the positions j to j + 3.
template <bool kWide>
FASTVQ_DEVICE float4 score_four(const Head& head, int j) {
    constexpr int kAtOnce = 8;
    float4 sums = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int d = 0; d < head.key_width; d += kAtOnce) {
        float4 keys[kAtOnce] = {};
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            if (d + i < head.key_width) {
                keys[i] = load_four<kWide>(head.keys + (d + i) * head.key_stride + j, head.count - j);
            }
        }
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            if (d + i < head.key_width) add_product(sums, head.query[d + i], keys[i]);
        }
    }
    return sums;
}

// How lanes share values: each has four channels of every `groups`-th position.
struct ValueLanes {
    int lanes, groups, group, channel;
};

FASTVQ_DEVICE ValueLanes value_lanes(int value_width, int first_channel) {
    ValueLanes split{};
    split.lanes = smaller(32, power_of_two((value_width + 3) / 4));
    split.groups = 32 / split.lanes;
    const int lane = threadIdx.x % 32;
    split.group = lane / split.lanes;
    split.channel = first_channel + lane % split.lanes * 4;
    return split;
}

// Adds the values of the tile from `first` on, times its weights.
template <bool kWide>
FASTVQ_DEVICE void weigh_tile(const Head& head, const ValueLanes& split, const float* weights, int first,
                              float4& sums) {
    constexpr int kAtOnce = 8;
    const int length = smaller(kTile, head.count - first), channels = head.value_width - split.channel;
    for (int base = split.group; base < length; base += kAtOnce * split.groups) {
        float4 values[kAtOnce] = {};
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const int place = base + i * split.groups;
            if (place < length && channels > 0) {
                values[i] = load_four<kWide>(head.values + (first + place) * head.value_stride + split.channel, channels);
            }
        }
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const int place = base + i * split.groups;
            if (place < length && channels > 0) add_product(sums, weights[place], values[i]);
        }
    }
}

FASTVQ_DEVICE float over_warp(float value, int first_mask) {
    for (int mask = first_mask; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
    return value;
}

// By a warp: the largest score of a strand, the sum of its weights exp(score - largest), and the sums of its values of
// up to 128 channels from `first_channel` on. `weights`: of the warp alone.
FASTVQ_DEVICE void attend_strand(const Head& head, int strand, int first_channel, float* weights, float* result) {
    const int lane = threadIdx.x % 32;
    const ValueLanes split = value_lanes(head.value_width, first_channel);
    float largest = -INFINITY, total = 0.0f;
    float4 sums = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int first = strand * kTile; first < head.count; first += kStrands * kTile) {
        const int j = first + 4 * lane, left = head.count - j;
        const float4 found = left <= 0                      ? float4{0.0f, 0.0f, 0.0f, 0.0f}
                             : head.wide_keys && left >= 4 ? score_four<true>(head, j)
                                                            : score_four<false>(head, j);
        const float scores[4] = {found.x, found.y, found.z, found.w};
        float most = largest;
        FASTVQ_UNROLL
        for (int i = 0; i < 4; ++i) most = i < left && scores[i] > most ? scores[i] : most;
        for (int mask = 1; mask < 32; mask *= 2) {
            const float other = shuffle_xor(most, mask);
            most = other > most ? other : most;
        }
        const float factor = expf(largest - most);
        largest = most;
        total *= factor;
        FASTVQ_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float weight = i < left ? expf(scores[i] - most) : 0.0f;
            weights[4 * lane + i] = weight;
            total += weight;
        }
        warp_barrier();
        sums = {sums.x * factor, sums.y * factor, sums.z * factor, sums.w * factor};
        if (head.wide_values) {
            weigh_tile<true>(head, split, weights, first, sums);
        } else {
            weigh_tile<false>(head, split, weights, first, sums);
        }
        warp_barrier();
    }
    total = over_warp(total, 1);
    const float channels[4] = {over_warp(sums.x, split.lanes), over_warp(sums.y, split.lanes),
                               over_warp(sums.z, split.lanes), over_warp(sums.w, split.lanes)};
    if (lane == 0) {
        result[0] = largest;
        result[1] = total;
    }
    if (split.group > 0) return;
    FASTVQ_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (split.channel + i < head.value_width) result[2 + split.channel + i] = channels[i];
    }
}

FASTVQ_DEVICE void attend(const StepArgs& args, const BlockState& state, const Instr& instr) {
    const HeldStep* held = steps_of(state, instr);
    const DeviceView queries = held[0].view, keys = held[1].view, values = held[2].view, out = held[3].view;
    const int count = args.row * args.width + state.column + (instr.inclusive ? 1 : 0);
    const int num_jobs = instr.last_job - instr.first_job;
    const AttendWork work = attend_work(num_jobs, instr.key_width, instr.value_width);
    const int result_size = 2 + instr.value_width, strands = smaller(kStrands, (count + kTile - 1) / kTile);
    auto* scaled = reinterpret_cast<float*>(state.work);
    auto* weights = reinterpret_cast<float*>(state.work + work.weights);
    auto* results = reinterpret_cast<float*>(state.work + work.strands);
    const float scale = 1.0f / sqrtf(static_cast<float>(instr.key_width));
    const int warp = threadIdx.x / 32, team = kWarps / work.jobs;
    for (int done = 0; done < num_jobs; done += work.jobs) {
        const int first = instr.first_job + done, now = smaller(work.jobs, num_jobs - done);
        for (int item = threadIdx.x; item < now * instr.key_width; item += kThreads) {
            const int job = item / instr.key_width, d = item - job * instr.key_width;
            const int sample = (first + job) / instr.heads, head = (first + job) % instr.heads;
            const float* query = vectors_at(queries, state.column) + sample * queries.batch_stride;
            scaled[item] = load_shared_state(query + head * instr.key_width + d) * scale;
        }
        block_barrier(Site::kAttendQuery);
        const int job = warp / team;
        if (job < now) {
            const int sample = (first + job) / instr.heads, number = (first + job) % instr.heads;
            Head head{};
            head.query = scaled + job * instr.key_width;
            head.keys = keys.data + sample * keys.batch_stride + int64_t{number} * instr.key_width * args.key_stride;
            // Values begin at the first position of the grid, the view at that of the row.
            head.values = values.data - int64_t{args.row} * args.width * values.column_stride +
                          sample * values.batch_stride + number * instr.value_width;
            head.key_stride = args.key_stride;
            head.value_stride = values.column_stride;
            head.key_width = instr.key_width;
            head.value_width = instr.value_width;
            head.count = count;
            head.wide_keys = reinterpret_cast<uintptr_t>(head.keys) % 16 == 0 && args.key_stride % 4 == 0;
            head.wide_values = reinterpret_cast<uintptr_t>(head.values) % 16 == 0 && head.value_stride % 4 == 0 &&
                               instr.value_width % 4 == 0;
            for (int strand = warp % team; strand < strands; strand += team) {
                float* result = results + (job * kStrands + strand) * result_size;
                for (int channel = 0; channel < instr.value_width; channel += 128) {
                    attend_strand(head, strand, channel, weights + warp * kTile, result);
                }
            }
        }
        block_barrier(Site::kAttendStrands);
        for (int item = threadIdx.x; item < now * instr.value_width; item += kThreads) {
            const int which = item / instr.value_width, e = item - which * instr.value_width;
            const float* result = results + which * kStrands * result_size;
            float largest = -INFINITY, total = 0.0f, sum = 0.0f;
            for (int s = 0; s < strands; ++s) {
                largest = result[s * result_size] > largest ? result[s * result_size] : largest;
            }
            for (int s = 0; s < strands; ++s) {
                const float* strand = result + s * result_size;
                const float factor = expf(strand[0] - largest);
                total = fmaf(factor, strand[1], total);
                sum = fmaf(factor, strand[2 + e], sum);
            }
            const int sample = (first + which) / instr.heads, head = (first + which) % instr.heads;
            float* place = vectors_at(out, state.column) + sample * out.batch_stride + head * instr.value_width + e;
            store_shared_state(place, count > 0 ? sum / total : 0.0f);
        }
    }
}

}  // namespace fastvq::cuda

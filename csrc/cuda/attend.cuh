// Queries against the positions so far. How the warps of a block share the work: AttendWork.
#pragma once

#include <cmath>

#include "cuda/chain.cuh"

namespace fastvq::cuda {

// What one head of one sample reads: keys of channel d and position j at keys[d * key_stride + j], values of position j
// at values[j * value_stride].
struct Head {
    const float* query;
    const float *keys, *values;
    int64_t key_stride, value_stride;
    int key_width, value_width, count;
};

// Numbers of a tile that a lane has on their way together.
constexpr int kAhead = 16, kValuesAhead = 8;

// The first `count` of four neighbours; the others are anything.
template <bool kWide>
FASTVQ_DEVICE float4 load_four(const float* address, int count) {
    if constexpr (kWide) return load_first(reinterpret_cast<const float4*>(address), count);
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

// Keys of the positions from j on, four for each of the channels from d on.
template <bool kWide>
FASTVQ_DEVICE void load_keys(const Head& head, int d, int j, float4 (&keys)[kAhead]) {
    const int left = head.count - j;
    const float* place = head.keys + d * head.key_stride + j;
    FASTVQ_UNROLL
    for (int i = 0; i < kAhead; ++i, place += head.key_stride) {
        if (d + i < head.key_width && left > 0) keys[i] = load_four<kWide>(place, left);
    }
}

FASTVQ_DEVICE void add_scores(const Head& head, const float* query, int d, const float4 (&keys)[kAhead], float4& sums) {
    FASTVQ_UNROLL
    for (int i = 0; i < kAhead; ++i) {
        if (d + i < head.key_width) add_product(sums, query[d + i], keys[i]);
    }
}

// How lanes share values: 2^lane_bits have four channels each of every groups-th position.
struct ValueLanes {
    int lane_bits, channel;

    FASTVQ_DEVICE ValueLanes(int value_width, int first_channel)
        : lane_bits(smaller(5, bits_for((value_width + 3) / 4))),
          channel(first_channel + (threadIdx.x & ((1 << lane_bits) - 1)) * 4) {}
    FASTVQ_DEVICE int groups() const { return 32 >> lane_bits; }
    FASTVQ_DEVICE int group() const { return threadIdx.x % 32 >> lane_bits; }
};

// Values of every groups-th position of the tile from `first` on, `base` being the first of them.
template <bool kWide>
FASTVQ_DEVICE void load_values(const Head& head, const ValueLanes& split, int first, int base,
                               float4 (&values)[kValuesAhead]) {
    const int length = smaller(kTile, head.count - first), channels = head.value_width - split.channel;
    const float* place = head.values + (first + base) * head.value_stride + split.channel;
    FASTVQ_UNROLL
    for (int i = 0; i < kValuesAhead; ++i, place += split.groups() * head.value_stride) {
        if (base + i * split.groups() < length && channels > 0) values[i] = load_four<kWide>(place, channels);
    }
}

FASTVQ_DEVICE void add_values(const Head& head, const ValueLanes& split, const float* weights, int first, int base,
                              const float4 (&values)[kValuesAhead], float4& sums) {
    const int length = smaller(kTile, head.count - first), channels = head.value_width - split.channel;
    FASTVQ_UNROLL
    for (int i = 0; i < kValuesAhead; ++i) {
        const int place = base + i * split.groups();
        if (place < length && channels > 0) add_product(sums, weights[place], values[i]);
    }
}

FASTVQ_DEVICE float over_warp(float value, int first_mask) {
    for (int mask = first_mask; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
    return value;
}

// The query, by a warp for itself, scaled.
FASTVQ_DEVICE void load_query(const Head& head, float* query) {
    const float scale = 1.0f / sqrtf(static_cast<float>(head.key_width));
    FASTVQ_ROLLED
    for (int d = threadIdx.x % 32; d < head.key_width; d += 32) query[d] = load_shared_state(head.query + d) * scale;
    warp_barrier();
}

// By a warp: the largest score of a strand, the sum of its weights exp(score - largest), and the sums of its values of
// up to 128 channels from `first_channel` on. `query`, `weights`: of the warp alone; the query is loaded if it is
// `fresh`.
template <bool kWideKeys, bool kWideValues>
FASTVQ_DEVICE void attend_strand(const Head& head, int strand, int first_channel, bool fresh, float* query,
                                 float* weights, float* result) {
    const int lane = threadIdx.x % 32;
    const ValueLanes split(head.value_width, first_channel);
    float largest = -INFINITY, total = 0.0f;
    float4 sums = {0.0f, 0.0f, 0.0f, 0.0f};
    float4 keys[kAhead] = {}, values[kValuesAhead] = {};
    load_keys<kWideKeys>(head, 0, strand * kTile + 4 * lane, keys);
    FASTVQ_ROLLED
    for (int first = strand * kTile; first < head.count; first += kStrands * kTile) {
        const int j = first + 4 * lane, left = head.count - j;
        load_values<kWideValues>(head, split, first, split.group(), values);
        if (fresh) load_query(head, query);
        fresh = false;
        float4 found = {0.0f, 0.0f, 0.0f, 0.0f};
        add_scores(head, query, 0, keys, found);
        FASTVQ_ROLLED
        for (int d = kAhead; d < head.key_width; d += kAhead) {
            load_keys<kWideKeys>(head, d, j, keys);
            add_scores(head, query, d, keys, found);
        }
        load_keys<kWideKeys>(head, 0, j + kStrands * kTile, keys);
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
        add_values(head, split, weights, first, split.group(), values, sums);
        const int step = kValuesAhead * split.groups();
        FASTVQ_ROLLED
        for (int base = split.group() + step; base < kTile; base += step) {
            load_values<kWideValues>(head, split, first, base, values);
            add_values(head, split, weights, first, base, values, sums);
        }
        warp_barrier();
    }
    total = over_warp(total, 1);
    const float channels[4] = {over_warp(sums.x, 1 << split.lane_bits), over_warp(sums.y, 1 << split.lane_bits),
                               over_warp(sums.z, 1 << split.lane_bits), over_warp(sums.w, 1 << split.lane_bits)};
    if (lane == 0) {
        result[0] = largest;
        result[1] = total;
    }
    if (split.group() > 0) return;
    FASTVQ_UNROLL
    for (int i = 0; i < 4; ++i) {
        if (split.channel + i < head.value_width) result[2 + split.channel + i] = channels[i];
    }
}

// A job's strands in order: the largest score of all, the sum of weights and that of values of channel e.
FASTVQ_DEVICE float over_strands(const float* results, int result_size, int strands, int e) {
    float most[kStrands], factors[kStrands], largest = -INFINITY, total = 0.0f, sum = 0.0f;
    FASTVQ_UNROLL
    for (int s = 0; s < kStrands; ++s) {
        most[s] = s < strands ? results[s * result_size] : -INFINITY;
        largest = most[s] > largest ? most[s] : largest;
    }
    FASTVQ_UNROLL
    for (int s = 0; s < kStrands; ++s) factors[s] = expf(most[s] - largest);
    FASTVQ_UNROLL
    for (int s = 0; s < kStrands; ++s) {
        if (s >= strands) continue;
        const float* strand = results + s * result_size;
        total = fmaf(factors[s], strand[1], total);
        sum = fmaf(factors[s], strand[2 + e], sum);
    }
    return sum / total;
}

// The step that follows, of one number: an activation.
FASTVQ_DEVICE void follow(const StepArgs& args, const BlockState& state, const Instr& instr, const HeldStep& held,
                          int sample, int channel, float x) {
    Items<1> item{};
    item.first_sample = sample;
    item.c[0] = channel;
    item.wanted[0] = true;
    const bool rectified = held.step.code == StepCode::kRelu;
    const Pair results[1] = {{rectified ? relu(x) : elu(x), elu(-x)}};  // the second one of a concatenated ELU alone
    store_results(args, state, instr, held, item, results);
}

FASTVQ_DEVICE void attend(const StepArgs& args, const BlockState& state, const Instr& instr) {
    const HeldStep* held = steps_of(state, instr);
    const int count = args.row * args.width + state.column + (instr.inclusive ? 1 : 0);
    const int strands = smaller(kStrands, (count + kTile - 1) / kTile);
    // What is the same for all jobs is read from shared memory again: registers are for what is on its way.
    const AttendWork& work = instr.attend;
    auto* results = reinterpret_cast<float*>(state.work + work.strands);
    for (int first = instr.first_job; first < instr.last_job; first += work.jobs) {
        if (first > instr.first_job) block_barrier(Site::kAttendUsed);
        const int team_bits = bits_for(kWarps) - work.job_bits;
        const int warp = threadIdx.x / 32, job = warp >> team_bits;
        if (first + job < instr.last_job) {
            auto* query = reinterpret_cast<float*>(state.work) + warp * instr.key_width;
            auto* weights = reinterpret_cast<float*>(state.work + work.weights) + warp * kTile;
            const int sample = (first + job) / instr.heads, number = (first + job) - sample * instr.heads;
            const DeviceView &queries = held[0].view, &keys = held[1].view, &values = held[2].view;
            Head head{};
            head.query = vectors_at(queries, state.column) + sample * queries.batch_stride + number * instr.key_width;
            head.keys = keys.data + sample * keys.batch_stride + int64_t{number} * instr.key_width * args.key_stride;
            // Values begin at the first position of the grid, the view at that of the row.
            head.values = values.data - int64_t{args.row} * args.width * values.column_stride +
                          sample * values.batch_stride + number * instr.value_width;
            head.key_stride = args.key_stride;
            head.value_stride = values.column_stride;
            head.key_width = instr.key_width;
            head.value_width = instr.value_width;
            head.count = count;
            const bool wide_keys = reinterpret_cast<uintptr_t>(head.keys) % 16 == 0 && args.key_stride % 4 == 0;
            const bool wide_values = reinterpret_cast<uintptr_t>(head.values) % 16 == 0 &&
                                     head.value_stride % 4 == 0 && instr.value_width % 4 == 0;
            FASTVQ_ROLLED
            for (int strand = warp & ((1 << team_bits) - 1); strand < strands; strand += 1 << team_bits) {
                const bool fresh = strand < 1 << team_bits;
                float* result = results + (job * kStrands + strand) * (2 + instr.value_width);
                FASTVQ_ROLLED
                for (int channel = 0; channel < instr.value_width; channel += 128) {
                    if (wide_keys && wide_values) {
                        attend_strand<true, true>(head, strand, channel, fresh && channel == 0, query, weights, result);
                    } else {
                        attend_strand<false, false>(head, strand, channel, fresh && channel == 0, query, weights,
                                                    result);
                    }
                }
            }
        }
        block_barrier(Site::kAttendStrands);
        const int now = smaller(work.jobs, instr.last_job - first), result_size = 2 + instr.value_width;
        for (int item = threadIdx.x; item < now * instr.value_width; item += kThreads) {
            const int which = now == 1 ? 0 : item / instr.value_width, e = item - which * instr.value_width;
            const float* result = results + which * kStrands * result_size;
            const int sample = (first + which) / instr.heads, head = (first + which) - sample * instr.heads;
            const int channel = head * instr.value_width + e;
            const float value = count > 0 ? over_strands(result, result_size, strands, e) : 0.0f;
            const DeviceView& out = held[3].view;
            store_shared_state(vectors_at(out, state.column) + sample * out.batch_stride + channel, value);
            if (instr.num_steps > 4) follow(args, state, instr, held[4], sample, channel, value);
        }
    }
}

}  // namespace fastvq::cuda

// The draw of csrc/cpu/draw.h by a block, one sample at a time.
#pragma once

#include <cmath>

#include "cuda/block_state.cuh"
#include "draw_exp.h"

namespace fastvq::cuda {

// The largest of the block, each thread having a number. `warps`: a float for each warp.
FASTVQ_DEVICE float largest_of(float value, float* warps) {
    const auto larger_of = [](float a, float b) { return b > a ? b : a; };
    for (int mask = 1; mask < 32; mask *= 2) value = larger_of(value, shuffle_xor(value, mask));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    block_barrier(Site::kDrawMax);
    value = -INFINITY;
    for (int warp = 0; warp < kWarps; ++warp) value = larger_of(value, warps[warp]);
    return value;
}

struct Before {
    double sum;    // of the numbers of threads before this one
    double total;  // of all threads
};

// `warps`: a double for each warp.
FASTVQ_DEVICE Before sum_before(double value, double* warps) {
    double before = 0.0;
    for (int mask = 1; mask < 32; mask *= 2) {
        const double other = shuffle_xor(value, mask);
        if (threadIdx.x & mask) before += other;
        value += other;
    }
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) warps[warp] = value;
    block_barrier(Site::kDrawScan);
    double warps_before = 0.0, total = 0.0;
    for (int w = 0; w < kWarps; ++w) {
        if (w == warp) warps_before = total;
        total += warps[w];
    }
    return {warps_before + before, total};
}

// The least of an integer below 2^24 of every thread. `warps`: a float for each warp.
FASTVQ_DEVICE int least(int number, float* warps) {
    float value = static_cast<float>(number);
    for (int mask = 1; mask < 32; mask *= 2) value = fminf(value, shuffle_xor(value, mask));
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    block_barrier(Site::kDrawFirst);
    for (int w = 0; w < kWarps; ++w) value = fminf(value, warps[w]);
    return static_cast<int>(value);
}

// How many codes come before code k in order of rank: greater logits, and equal ones of a lower index. Logits are
// padded with -inf to a multiple of 4. All lanes of a warp have codes of the same 32.
FASTVQ_DEVICE int rank_of(int k, const float* logits, int num_codes) {
    const auto* vectors = reinterpret_cast<const float4*>(logits);
    const float own = logits[k];
    const int count = (num_codes + 3) / 4, below = k / 32 * 8, above = smaller(count, below + 8);
    int rank = 0;
    for (int j = 0; j < below; ++j) {
        const float4 v = vectors[j];
        rank += (v.x >= own) + (v.y >= own) + (v.z >= own) + (v.w >= own);
    }
    for (int j = below * 4; j < above * 4; ++j) rank += logits[j] > own || (logits[j] == own && j < k);
    for (int j = above; j < count; ++j) {
        const float4 v = vectors[j];
        rank += (v.x > own) + (v.y > own) + (v.z > own) + (v.w > own);
    }
    return rank;
}

struct DrawMemory {
    double* scan;    // one for each warp
    float* least;    // likewise
    float* largest;  // likewise
    float* values;   // logits, then weights
    float* sorted;
    int32_t* ranks;
};

FASTVQ_DEVICE DrawMemory draw_memory(char* memory, int num_codes) {
    const DrawWork work = draw_work(num_codes);
    auto* scan = reinterpret_cast<double*>(memory);
    return {scan,
            reinterpret_cast<float*>(scan + kWarps),
            reinterpret_cast<float*>(memory + work.reduce),
            reinterpret_cast<float*>(memory + work.values),
            reinterpret_cast<float*>(memory + work.sorted),
            reinterpret_cast<int32_t*>(memory + work.ranks)};
}

// Turns logits into weights, 0 for those that top-k and top-p leave out.
FASTVQ_DEVICE void weigh_filtered(const StepArgs& args, const DrawMemory& memory, float largest) {
    const int num_codes = args.num_codes;
    for (int k = threadIdx.x; k < num_codes; k += kThreads) memory.ranks[k] = rank_of(k, memory.values, num_codes);
    block_barrier(Site::kDrawRanks);
    for (int k = threadIdx.x; k < num_codes; k += kThreads) {
        const float weight = draw_weight(memory.values[k], largest, args.temperature);
        memory.sorted[memory.ranks[k]] = weight;
        memory.values[k] = memory.ranks[k] < args.top_k ? weight : 0.0f;
    }
    if (!(args.top_p < 1.0f)) return;
    block_barrier(Site::kDrawSorted);
    const int most = smaller(args.top_k, num_codes), each = (most + kThreads - 1) / kThreads;
    const int first = smaller(most, threadIdx.x * each), last = smaller(most, first + each);
    double sum = 0.0;
    for (int rank = first; rank < last; ++rank) sum += memory.sorted[rank];
    const Before before = sum_before(sum, memory.scan);
    const float threshold = args.top_p * static_cast<float>(before.total);
    // The fewest codes, at least one, whose weights reach the threshold.
    int kept = most;
    sum = before.sum;
    for (int rank = first; rank < last; ++rank) {
        sum += memory.sorted[rank];
        if (!(static_cast<float>(sum) < threshold)) {
            kept = rank + 1;
            break;
        }
    }
    kept = least(kept, memory.least);
    for (int k = threadIdx.x; k < num_codes; k += kThreads) {
        if (memory.ranks[k] >= kept) memory.values[k] = 0.0f;
    }
}

// The first code whose cumulative weight exceeds the share u of all.
FASTVQ_DEVICE int choose(const DrawMemory& memory, int num_codes, float u) {
    const int each = (num_codes + kThreads - 1) / kThreads;
    const int first = smaller(num_codes, threadIdx.x * each), last = smaller(num_codes, first + each);
    double sum = 0.0;
    for (int k = first; k < last; ++k) sum += memory.values[k];
    const Before before = sum_before(sum, memory.scan);
    const float target = u * static_cast<float>(before.total);
    // Sums of different threads are rounded in different orders, so that one may grow from thread to thread where no
    // weight is, or end below the total: codes of weight 0 are passed over, and in the end the last other one is taken.
    int chosen = num_codes, last_weighed = -1;
    sum = before.sum;
    for (int k = first; k < last; ++k) {
        const float weight = memory.values[k];
        sum += weight;
        if (weight > 0.0f) {
            last_weighed = k;
            if (static_cast<float>(sum) > target) {
                chosen = k;
                break;
            }
        }
    }
    // Numbers beyond num_codes stand for the last resort, the greatest code first.
    if (chosen == num_codes && last_weighed >= 0) chosen = 2 * num_codes - last_weighed;
    if (chosen == num_codes) chosen = 2 * num_codes + 1;
    chosen = least(chosen, memory.least);
    return chosen < num_codes ? chosen : 2 * num_codes - chosen;
}

FASTVQ_DEVICE void draw(const StepArgs& args, const BlockState& state, const Instr& instr) {
    const DeviceView view = steps_of(state, instr)[0].view;
    const float* from = vectors_at(view, state.column);
    const int num_codes = args.num_codes;
    const DrawMemory memory = draw_memory(state.work, num_codes);
    const bool filtered = args.top_k < num_codes || args.top_p < 1.0f;
    for (int sample = instr.first_job; sample < instr.last_job; ++sample) {
        if (args.known[sample * args.known_stride + state.column]) continue;
        const float u = args.uniforms[sample * args.uniform_stride + state.column];
        const float* logits = from + sample * view.batch_stride;
        float largest = -INFINITY;
        for (int k = threadIdx.x; k < round_up(num_codes, 4); k += kThreads) {
            const float logit = k < num_codes ? load_shared_state(logits + k) : -INFINITY;
            memory.values[k] = logit;
            // NaN counts as +inf, which cannot be drawn from either.
            largest = logit < INFINITY ? (logit > largest ? logit : largest) : INFINITY;
        }
        largest = largest_of(largest, memory.largest);
        const bool drawable = largest < INFINITY && largest > -INFINITY && u >= 0.0f && u < 1.0f;
        if (filtered) {
            weigh_filtered(args, memory, largest);
        } else {
            for (int k = threadIdx.x; k < num_codes; k += kThreads) {
                memory.values[k] = draw_weight(memory.values[k], largest, args.temperature);
            }
        }
        block_barrier(Site::kDrawWeights);
        const int code = choose(memory, num_codes, u);
        if (threadIdx.x == 0) {
            store_shared_state(args.codes + sample * args.code_stride + state.column, int64_t{drawable ? code : 0});
            if (!drawable) {
                const int64_t position = int64_t{args.row} * args.width + state.column;
                lower(args.status, static_cast<unsigned long long>(position * args.batch + sample));
            }
        }
    }
}

}  // namespace fastvq::cuda

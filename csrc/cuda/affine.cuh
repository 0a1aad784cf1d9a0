// Vectors times the weights of a slice, added to what rows above contribute. How threads share the work: AffineWork.
#pragma once

#include "cuda/chain.cuh"

namespace fastvq::cuda {

// The vectors that the weights multiply.
struct Inputs {
    const Segment* segments;
    int terms, depth;
    bool wide;  // all segments
};

FASTVQ_DEVICE Inputs inputs_of(const BlockState& state, const Instr& instr) {
    bool wide = true;
    for (int t = 0; t < instr.num_terms; ++t) wide = wide && state.segments[t].wide_end != 0;
    return {state.segments, instr.num_terms, instr.depth, wide};
}

// Four numbers, zeros beyond the depth.
template <bool kWide>
FASTVQ_DEVICE float4 load_inputs(const Inputs& inputs, int64_t sample, int k) {
    int t = 0;
    const auto segment_of = [&](int place) -> const Segment& {
        while (t + 1 < inputs.terms && place >= inputs.segments[t + 1].begin) ++t;
        return inputs.segments[t];
    };
    if constexpr (kWide) {
        if (k >= inputs.depth) return {0.0f, 0.0f, 0.0f, 0.0f};
        const Segment& segment = segment_of(k);
        const int64_t place = sample * segment.stride + k - segment.begin;
        if (segment.rounded) {
            const auto* first = static_cast<const uint16_t*>(segment.data) + place;
            const uint2 raw = load_shared_state(reinterpret_cast<const uint2*>(first));
            return {float_of(raw.x << 16), float_of(raw.x & 0xFFFF0000u), float_of(raw.y << 16),
                    float_of(raw.y & 0xFFFF0000u)};
        }
        const float* first = static_cast<const float*>(segment.data) + place;
        return load_shared_state(reinterpret_cast<const float4*>(first));
    }
    const auto one = [&](int place) {
        if (place >= inputs.depth) return 0.0f;
        const Segment& segment = segment_of(place);
        const int64_t number = sample * segment.stride + place - segment.begin;
        if (!segment.rounded) return load_shared_state(static_cast<const float*>(segment.data) + number);
        const uint32_t half = load_shared_state(static_cast<const uint16_t*>(segment.data) + number);
        return float_of(half << 16);
    };
    float4 numbers;
    numbers.x = one(k);
    numbers.y = one(k + 1);
    numbers.z = one(k + 2);
    numbers.w = one(k + 3);
    return numbers;
}

// Rows of the stage: the numbers [first, first + length) of the vectors of some samples, zeros beyond the depth and for
// samples from `rows` to `padded_rows`. `length` is a multiple of 4.
struct Stage {
    char* memory;
    int row;  // elements between rows
    int first_sample, rows, padded_rows;
    Inputs inputs;
};

template <bool kRounded, bool kWide, int kAtOnce>
FASTVQ_DEVICE void fill_stage(const Stage& stage, int first, int length) {
    const int vectors = length / 4, items = stage.padded_rows * vectors;
    for (int base = threadIdx.x; base < items; base += kAtOnce * kThreads) {
        float4 inputs[kAtOnce];
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const int item = base + i * kThreads, row = item / vectors;
            inputs[i] = {0.0f, 0.0f, 0.0f, 0.0f};
            if (item < items && row < stage.rows) {
                const int k = first + (item - row * vectors) * 4;
                inputs[i] = load_inputs<kWide>(stage.inputs, stage.first_sample + row, k);
            }
        }
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            const int item = base + i * kThreads, row = item / vectors;
            if (item >= items) continue;
            const int place = row * stage.row + (item - row * vectors) * 4;
            if constexpr (kRounded) {
                const uint2 rounded = {pack_bf16(inputs[i].x, inputs[i].y), pack_bf16(inputs[i].z, inputs[i].w)};
                *reinterpret_cast<uint2*>(reinterpret_cast<uint16_t*>(stage.memory) + place) = rounded;
            } else {
                *reinterpret_cast<float4*>(reinterpret_cast<float*>(stage.memory) + place) = inputs[i];
            }
        }
    }
}

template <bool kRounded, int kAtOnce>
FASTVQ_DEVICE void stage_inputs(const Stage& stage, int first, int length) {
    if (stage.inputs.wide) {
        fill_stage<kRounded, true, kAtOnce>(stage, first, length);
    } else {
        fill_stage<kRounded, false, 1>(stage, first, length);
    }
}

template <bool kStationary>
FASTVQ_DEVICE uint4 load_weights(const uint4* address) {
    if constexpr (kStationary) {
        return *address;
    } else {
        return load_streamed(address);
    }
}

FASTVQ_DEVICE void unpack(const uint4& raw, float (&weights)[4]) {
    weights[0] = float_of(raw.x);
    weights[1] = float_of(raw.y);
    weights[2] = float_of(raw.z);
    weights[3] = float_of(raw.w);
}

FASTVQ_DEVICE void unpack(const uint4& raw, float (&weights)[8]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
    FASTVQ_UNROLL
    for (int i = 0; i < 4; ++i) {
        weights[2 * i] = float_of(words[i] << 16);
        weights[2 * i + 1] = float_of(words[i] & 0xFFFF0000u);
    }
}

template <int kVector, int kGroup>
FASTVQ_DEVICE void multiply_add(float (&sums)[kGroup][kVector], const uint4& raw, const float* x, int row, int rows) {
    float weights[kVector];
    unpack(raw, weights);
    FASTVQ_UNROLL
    for (int g = 0; g < kGroup; ++g) {
        const float input = x[smaller(g, rows - 1) * row];
        FASTVQ_UNROLL
        for (int v = 0; v < kVector; ++v) sums[g][v] = fmaf(input, weights[v], sums[g][v]);
    }
}

// At most kGroup samples.
template <int kVector, int kGroup, bool kStationary>
FASTVQ_DEVICE void affine_plain(const Instr& instr, const AffineWork& work, const char* all_weights, Stage stage,
                                const Sums& places) {
    constexpr int kAtOnce = 4;
    const int lane = threadIdx.x % work.lanes, split = threadIdx.x / work.lanes, column = lane * kVector;
    const bool active = column < instr.columns;
    const int stride = instr.columns / kVector, step = work.splits * stride;
    const uint4* weights = reinterpret_cast<const uint4*>(all_weights + instr.weights) + split * stride + lane;
    const float* staged = reinterpret_cast<const float*>(stage.memory);

    float sums[kGroup][kVector] = {};
    int k = split;
    for (int first = 0; first < instr.depth; first += work.piece) {
        if (first > 0) block_barrier(Site::kPieceUsed);
        const int end = smaller(instr.depth, first + work.piece);
        stage_inputs<false, 4>(stage, first, round_up(end - first, 4));
        block_barrier(Site::kPieceStaged);
        if (!active) continue;
        for (; k + (kAtOnce - 1) * work.splits < end; k += kAtOnce * work.splits, weights += kAtOnce * step) {
            uint4 raw[kAtOnce];
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) raw[i] = load_weights<kStationary>(weights + i * step);
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                multiply_add(sums, raw[i], staged + k + i * work.splits - first, work.row, stage.rows);
            }
        }
        for (; k < end; k += work.splits, weights += step) {
            multiply_add(sums, load_weights<kStationary>(weights), staged + k - first, work.row, stage.rows);
        }
    }
    for (int mask = work.lanes; mask < 32; mask *= 2) {
        FASTVQ_UNROLL
        for (int g = 0; g < kGroup; ++g) {
            FASTVQ_UNROLL
            for (int v = 0; v < kVector; ++v) sums[g][v] += shuffle_xor(sums[g][v], mask);
        }
    }
    block_barrier(Site::kPieceUsed);
    float* partial = reinterpret_cast<float*>(stage.memory);
    const bool first_of_equals = static_cast<int>(threadIdx.x % 32) < work.lanes;
    if (active && first_of_equals) {
        const int part = threadIdx.x / larger(work.lanes, 32);
        FASTVQ_UNROLL
        for (int g = 0; g < kGroup; ++g) {
            if (g >= stage.rows) continue;
            auto* out = reinterpret_cast<float4*>(partial + places.place(part, g, column));
            FASTVQ_UNROLL
            for (int v = 0; v < kVector; v += 4) {
                out[v / 4] = {sums[g][v], sums[g][v + 1], sums[g][v + 2], sums[g][v + 3]};
            }
        }
    }
}

// At most kTiles tiles of 8 samples.
template <int kTiles, bool kStationary>
FASTVQ_DEVICE void affine_fragments(const Instr& instr, const AffineWork& work, const char* all_weights, Stage stage,
                                    const Sums& places) {
    constexpr int kAtOnce = 4;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = warp % work.lanes, split = warp / work.lanes;
    const bool active = tile * 16 < instr.columns;
    const int depth_tiles = (instr.depth + 15) / 16;
    const uint4* weights = reinterpret_cast<const uint4*>(all_weights + instr.weights) + tile * depth_tiles * 32 + lane;
    const int tiles = stage.padded_rows / 8;
    // Operand B of this lane: sample lane / 4 of a tile, numbers 2 (lane % 4) and following.
    const uint16_t* staged = reinterpret_cast<const uint16_t*>(stage.memory) + lane / 4 * work.row + lane % 4 * 2;

    float sums[kTiles][4] = {};
    const auto multiply = [&](const uint4& raw, const uint16_t* inputs) {
        const uint32_t a[4] = {raw.x, raw.y, raw.z, raw.w};
        FASTVQ_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            if (n >= tiles) continue;
            const auto* words = reinterpret_cast<const uint32_t*>(inputs + n * 8 * work.row);
            const uint32_t b[2] = {words[0], words[4]};
            mma_16x8x16(sums[n], a, b);
        }
    };
    int k = split;  // in tiles
    for (int first = 0; first < instr.depth; first += work.piece) {
        if (first > 0) block_barrier(Site::kPieceUsed);
        const int end = smaller(depth_tiles * 16, first + work.piece), last = end / 16;
        stage_inputs<true, 8>(stage, first, end - first);
        block_barrier(Site::kPieceStaged);
        if (!active) continue;
        for (; k + (kAtOnce - 1) * work.splits < last; k += kAtOnce * work.splits) {
            uint4 raw[kAtOnce];
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) raw[i] = load_weights<kStationary>(weights + (k + i * work.splits) * 32);
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) multiply(raw[i], staged + (k + i * work.splits) * 16 - first);
        }
        for (; k < last; k += work.splits) {
            multiply(load_weights<kStationary>(weights + k * 32), staged + k * 16 - first);
        }
    }
    block_barrier(Site::kPieceUsed);
    float* partial = reinterpret_cast<float*>(stage.memory);
    if (active) {
        FASTVQ_UNROLL
        for (int n = 0; n < kTiles; ++n) {
            if (n >= tiles) continue;
            FASTVQ_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int sample = n * 8 + lane % 4 * 2 + i % 2, column = tile * 16 + lane / 4 + i / 2 * 8;
                partial[places.place(split, sample, column)] = sums[n][i];
            }
        }
    }
}

template <bool kStationary>
FASTVQ_DEVICE void affine_samples(const Instr& instr, const AffineWork& work, const char* weights, const Stage& stage,
                                  const Sums& places) {
    const int rows = stage.rows;
    if (instr.layout == Layout::kFloat) {
        if (rows == 1) {
            affine_plain<4, 1, kStationary>(instr, work, weights, stage, places);
        } else if (rows <= 4) {
            affine_plain<4, 4, kStationary>(instr, work, weights, stage, places);
        } else {
            affine_plain<4, 8, kStationary>(instr, work, weights, stage, places);
        }
    } else if (instr.layout == Layout::kBfloat) {
        if (rows == 1) {
            affine_plain<8, 1, kStationary>(instr, work, weights, stage, places);
        } else {
            affine_plain<8, 4, kStationary>(instr, work, weights, stage, places);
        }
    } else if (rows <= 8) {
        affine_fragments<1, kStationary>(instr, work, weights, stage, places);
    } else if (rows <= 16) {
        affine_fragments<2, kStationary>(instr, work, weights, stage, places);
    } else if (rows <= 32) {
        affine_fragments<4, kStationary>(instr, work, weights, stage, places);
    } else {
        affine_fragments<8, kStationary>(instr, work, weights, stage, places);
    }
}

// The sums of the samples [first_sample, first_sample + rows), each in parts, which are there after a barrier.
FASTVQ_DEVICE Sums affine(const StepArgs& args, const BlockState& state, const Instr& instr, int first_sample,
                          int rows) {
    const AffineWork work = affine_work(instr.layout, instr.columns, instr.depth, args.batch);
    const bool fragments = instr.layout == Layout::kFragments;
    const int padded_rows = fragments ? round_up(rows, 8) : rows;
    const Stage stage{state.work, work.row, first_sample, rows, padded_rows, inputs_of(state, instr)};
    const Sums sums{reinterpret_cast<const float*>(state.work), work.partials, padded_rows, instr.columns, fragments};
    if (instr.stationary) {
        affine_samples<true>(instr, work, state.stationary, stage, sums);
    } else {
        affine_samples<false>(instr, work, args.weights, stage, sums);
    }
    return sums;
}

}  // namespace fastvq::cuda

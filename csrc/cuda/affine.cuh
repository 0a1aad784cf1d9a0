// Vectors times the weights of a slice, added to what rows above contribute. How threads share the work: AffineWork.
#pragma once

#include "cuda/chain.cuh"

namespace fastvq::cuda {

// Rows of the stage: numbers of the vectors of the samples [first_sample, first_sample + rows).
struct Stage {
    char* memory;
    int row;  // elements between rows
    int first_sample, rows;
    const Segment* segments;
    int terms, depth;
};

// The vectors of a thread, of `count` of each row: row by row, 2^lane_bits threads side by side.
struct Walk {
    int row, vector;
    int rows, count, lane_bits;

    FASTVQ_DEVICE Walk(int rows_, int count_, int lane_bits_)
        : row(threadIdx.x >> lane_bits_), vector(threadIdx.x & ((1 << lane_bits_) - 1)), rows(rows_), count(count_),
          lane_bits(lane_bits_) {
        if (vector >= count) row = rows;
    }
    FASTVQ_DEVICE bool more() const { return row < rows; }
    FASTVQ_DEVICE void go_on() {
        vector += 1 << lane_bits;
        if (vector >= count) {
            vector = threadIdx.x & ((1 << lane_bits) - 1);
            row += kThreads >> lane_bits;
        }
    }
};

FASTVQ_DEVICE void put(float* to, float number) { *to = number; }
FASTVQ_DEVICE void put(uint16_t* to, float number) { *to = static_cast<uint16_t>(pack_bf16(number, 0.0f)); }
FASTVQ_DEVICE void put(uint16_t* to, uint16_t number) { *to = number; }
FASTVQ_DEVICE void put(uint16_t* to, const float4& numbers) {
    *reinterpret_cast<uint2*>(to) = {pack_bf16(numbers.x, numbers.y), pack_bf16(numbers.z, numbers.w)};
}

// Through registers, some loads on their way together: numbers that the stage has in another type, or one by one.
// `from` and `to`: of the first sample.
template <int kAtOnce, class Vector, class From, class To>
FASTVQ_DEVICE void stage_loaded(const From* from, int64_t stride, To* to, int row, Walk walk) {
    constexpr int kNumbers = sizeof(Vector) / sizeof(From);
    while (walk.more()) {
        Vector loaded[kAtOnce] = {};
        int places[kAtOnce];
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            places[i] = -1;
            if (!walk.more()) continue;
            loaded[i] = load_shared_state(
                reinterpret_cast<const Vector*>(from + walk.row * stride + walk.vector * kNumbers));
            places[i] = walk.row * row + walk.vector * kNumbers;
            walk.go_on();
        }
        FASTVQ_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
            if (places[i] >= 0) put(to + places[i], loaded[i]);
        }
    }
}

// As they are, 16 bytes at a time, all on their way together.
template <class Number>
FASTVQ_DEVICE void stage_copied(const Number* from, int64_t stride, Number* to, int row, Walk walk) {
    constexpr int kNumbers = 16 / sizeof(Number);
    FASTVQ_ROLLED
    for (; walk.more(); walk.go_on()) {
        copy_shared_state(to + walk.row * row + walk.vector * kNumbers,
                          from + walk.row * stride + walk.vector * kNumbers);
    }
}

// The numbers [first, last) of the vectors; where the stage is in bfloat16, zeros beyond the depth.
template <class Number>
FASTVQ_DEVICE void stage_inputs(const Stage& stage, int first, int last) {
    constexpr bool kRounded = sizeof(Number) == 2;
    auto* memory = reinterpret_cast<Number*>(stage.memory);
    for (int t = 0; t < stage.terms; ++t) {
        const Segment segment = stage.segments[t];
        const int begin = larger(segment.begin, first), end = smaller(segment.end, last);
        if (begin >= end) continue;
        const int64_t skipped = stage.first_sample * segment.stride + begin - segment.begin;
        const auto* floats = static_cast<const float*>(segment.data) + skipped;
        const auto* halves = static_cast<const uint16_t*>(segment.data) + skipped;
        Number* to = memory + begin - first;
        const Walk walk(stage.rows, (end - begin) >> segment.vector_bits, segment.lane_bits);
        const bool wide = segment.vector_bits > 0;
        if constexpr (kRounded) {
            if (segment.rounded && wide) {
                stage_copied(halves, segment.stride, to, stage.row, walk);
            } else if (segment.rounded) {
                stage_loaded<4, uint16_t>(halves, segment.stride, to, stage.row, walk);
            } else if (wide) {
                stage_loaded<8, float4>(floats, segment.stride, to, stage.row, walk);
            } else {
                stage_loaded<4, float>(floats, segment.stride, to, stage.row, walk);
            }
        } else if (wide) {
            stage_copied(floats, segment.stride, to, stage.row, walk);
        } else {
            stage_loaded<4, float>(floats, segment.stride, to, stage.row, walk);
        }
    }
    if constexpr (kRounded) {
        const int begin = larger(stage.depth, first);
        for (Walk walk(stage.rows, last - begin, 4); walk.more(); walk.go_on()) {
            put(memory + walk.row * stage.row + begin - first + walk.vector, uint16_t{0});
        }
    }
    wait_for_copies(Site::kPieceCopied);
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
FASTVQ_DEVICE void affine_plain(const Instr& instr, const AffineWork& work, const char* all_weights, const Stage& stage,
                                const Sums& places) {
    constexpr int kAtOnce = kStationary ? 4 : 16 / (kGroup > 1 ? 2 : 1);  // more where they come from afar
    const int lane = threadIdx.x & (work.lanes - 1), split = threadIdx.x >> work.lane_bits, column = lane * kVector;
    const bool active = column < instr.columns;
    const int stride = instr.columns / kVector, step = work.splits * stride;
    const uint4* weights = reinterpret_cast<const uint4*>(all_weights + instr.weights) + split * stride + lane;
    const float* staged = reinterpret_cast<const float*>(stage.memory);

    float sums[kGroup][kVector] = {};
    int k = split;
    for (int first = 0; first < instr.depth; first += work.piece) {
        if (first > 0) block_barrier(Site::kPieceUsed);
        const int end = smaller(instr.depth, first + work.piece);
        stage_inputs<float>(stage, first, end);
        block_barrier(Site::kPieceStaged);
        if (!active) continue;
        FASTVQ_ROLLED
        for (; k + (kAtOnce - 1) * work.splits < end; k += kAtOnce * work.splits, weights += kAtOnce * step) {
            uint4 raw[kAtOnce];
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) raw[i] = load_weights<kStationary>(weights + i * step);
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                multiply_add(sums, raw[i], staged + k + i * work.splits - first, work.row, stage.rows);
            }
        }
        FASTVQ_ROLLED
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
        const int part = threadIdx.x >> larger(work.lane_bits, 5);
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
FASTVQ_DEVICE void affine_fragments(const Instr& instr, const AffineWork& work, const char* all_weights,
                                    const Stage& stage, const Sums& places) {
    constexpr int kAtOnce = kStationary ? 4 : 8;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = warp & (work.lanes - 1), split = warp >> work.lane_bits;
    const bool active = tile * 16 < instr.columns;
    const int depth_tiles = (instr.depth + 15) / 16;
    const uint4* weights = reinterpret_cast<const uint4*>(all_weights + instr.weights) + tile * depth_tiles * 32 + lane;
    const int tiles = (stage.rows + 7) / 8;
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
        stage_inputs<uint16_t>(stage, first, end);
        block_barrier(Site::kPieceStaged);
        if (!active) continue;
        FASTVQ_ROLLED
        for (; k + (kAtOnce - 1) * work.splits < last; k += kAtOnce * work.splits) {
            uint4 raw[kAtOnce];
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) raw[i] = load_weights<kStationary>(weights + (k + i * work.splits) * 32);
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) multiply(raw[i], staged + (k + i * work.splits) * 16 - first);
        }
        FASTVQ_ROLLED
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
    const AffineWork work = instr.affine;
    const bool fragments = instr.layout == Layout::kFragments;
    const Stage stage{state.work, work.row, first_sample, rows, state.segments, instr.num_terms, instr.depth};
    const int padded_rows = fragments ? round_up(rows, 8) : rows;
    const Sums sums{reinterpret_cast<const float*>(state.work), work.partials, padded_rows, instr.columns, fragments};
    if (instr.stationary) {
        affine_samples<true>(instr, work, state.stationary, stage, sums);
    } else {
        affine_samples<false>(instr, work, args.weights, stage, sums);
    }
    return sums;
}

}  // namespace fastvq::cuda

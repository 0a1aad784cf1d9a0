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

// The numbers [first, last) of the vectors, zeros beyond the depth.
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
    const int beyond = larger(stage.depth, first);
    for (Walk walk(stage.rows, last - beyond, 4); walk.more(); walk.go_on()) {
        put(memory + walk.row * stage.row + beyond - first + walk.vector, Number{0});
    }
    wait_for_copies(Site::kPieceCopied);
}

// Two floats, each the sum of three bfloat16 that have its 24 bits. Products of such parts are exact, and of the nine
// products of two floats' parts the three smallest are below what float32 rounds away.
struct Parts {
    uint32_t high, middle, low;

    FASTVQ_DEVICE Parts(float first, float second) {
        high = take(first, second);
        middle = take(first, second);
        low = pack_bf16(first, second);
    }

   private:
    FASTVQ_DEVICE static uint32_t take(float& first, float& second) {
        const uint32_t taken = pack_bf16(first, second);
        first -= float_of(taken << 16);
        second -= float_of(taken & 0xFFFF0000u);
        return taken;
    }
};

// What a lane has of a tile of weights.
template <class Number>
struct Weights;

template <>
struct Weights<uint16_t> {
    uint4 words;

    template <bool kStationary>
    FASTVQ_DEVICE static Weights load(const char* tile, int lane) {
        const auto* place = reinterpret_cast<const uint4*>(tile) + lane;
        if constexpr (kStationary) return {*place};
        return {load_streamed(place)};
    }
};

template <>
struct Weights<float> {
    uint4 words[2];

    template <bool kStationary>
    FASTVQ_DEVICE static Weights load(const char* tile, int lane) {
        const auto* place = reinterpret_cast<const uint4*>(tile) + lane;
        if constexpr (kStationary) return {{place[0], place[32]}};
        return {{load_streamed(place), load_streamed(place + 32)}};
    }
};

// Sums of a lane of a tile: those of the largest products, and in float32 those of the others.
template <class Number>
struct TileSums;

template <>
struct TileSums<uint16_t> {
    float sums[4] = {};

    FASTVQ_DEVICE float total(int i) const { return sums[i]; }
};

template <>
struct TileSums<float> {
    float sums[4] = {}, small[4] = {};

    FASTVQ_DEVICE float total(int i) const { return sums[i] + small[i]; }
};

// The tile of weights times the inputs of some tiles of 8 samples, `row` numbers apart. Operand B of this lane begins at
// `inputs`: sample lane / 4, numbers 2 (lane % 4) and following.
template <int kTiles>
FASTVQ_DEVICE void multiply_tile(const Weights<uint16_t>& weights, const uint16_t* inputs, int row, int tiles,
                                 TileSums<uint16_t> (&sums)[kTiles]) {
    const uint32_t a[4] = {weights.words.x, weights.words.y, weights.words.z, weights.words.w};
    FASTVQ_UNROLL
    for (int n = 0; n < kTiles; ++n) {
        if (n >= tiles) continue;
        const auto* words = reinterpret_cast<const uint32_t*>(inputs + n * 8 * row);
        const uint32_t b[2] = {words[0], words[4]};
        mma_16x8x16(sums[n].sums, a, b);
    }
}

template <int kTiles>
FASTVQ_DEVICE void multiply_tile(const Weights<float>& weights, const float* inputs, int row, int tiles,
                                 TileSums<float> (&sums)[kTiles]) {
    const uint4 *lower = &weights.words[0], *upper = &weights.words[1];
    const Parts a[4] = {{float_of(lower->x), float_of(lower->y)},
                         {float_of(lower->z), float_of(lower->w)},
                         {float_of(upper->x), float_of(upper->y)},
                         {float_of(upper->z), float_of(upper->w)}};
    const uint32_t a_high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
    const uint32_t a_middle[4] = {a[0].middle, a[1].middle, a[2].middle, a[3].middle};
    const uint32_t a_low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
    FASTVQ_UNROLL
    for (int n = 0; n < kTiles; ++n) {
        if (n >= tiles) continue;
        const auto* pairs = reinterpret_cast<const float2*>(inputs + n * 8 * row);
        const float2 first = pairs[0], second = pairs[4];
        const Parts b[2] = {{first.x, first.y}, {second.x, second.y}};
        const uint32_t b_high[2] = {b[0].high, b[1].high}, b_middle[2] = {b[0].middle, b[1].middle};
        const uint32_t b_low[2] = {b[0].low, b[1].low};
        mma_16x8x16(sums[n].small, a_low, b_high);
        mma_16x8x16(sums[n].small, a_high, b_low);
        mma_16x8x16(sums[n].small, a_middle, b_middle);
        mma_16x8x16(sums[n].small, a_middle, b_high);
        mma_16x8x16(sums[n].small, a_high, b_middle);
        mma_16x8x16(sums[n].sums, a_high, b_high);
    }
}

// Of at most kTiles tiles of 8 samples.
template <class Number, int kTiles, bool kStationary>
FASTVQ_DEVICE void affine_tiles(const Instr& instr, const char* all_weights, const Stage& stage, const Sums& places) {
    constexpr int kAtOnce = (kStationary ? 8 : 16) / static_cast<int>(sizeof(Number));
    constexpr int kBytes = 256 * static_cast<int>(sizeof(Number));  // of a tile
    const AffineWork& work = instr.affine;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = warp & (work.lanes - 1), split = warp >> work.lane_bits;
    const bool active = tile * 16 < instr.columns;
    const int depth_tiles = (instr.depth + 15) / 16;
    const char* weights = all_weights + instr.weights + static_cast<int64_t>(tile) * depth_tiles * kBytes;
    const int tiles = (stage.rows + 7) / 8;
    const auto* staged = reinterpret_cast<const Number*>(stage.memory) + lane / 4 * stage.row + lane % 4 * 2;

    TileSums<Number> sums[kTiles];
    int k = split;  // in tiles
    for (int first = 0; first < instr.depth; first += work.piece) {
        if (first > 0) block_barrier(Site::kPieceUsed);
        const int end = smaller(depth_tiles * 16, first + work.piece), last = end / 16;
        stage_inputs<Number>(stage, first, end);
        block_barrier(Site::kPieceStaged);
        if (!active) continue;
        FASTVQ_ROLLED
        for (; k + (kAtOnce - 1) * work.splits < last; k += kAtOnce * work.splits) {
            Weights<Number> loaded[kAtOnce];
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                loaded[i] = Weights<Number>::template load<kStationary>(weights + (k + i * work.splits) * kBytes, lane);
            }
            FASTVQ_UNROLL
            for (int i = 0; i < kAtOnce; ++i) {
                multiply_tile(loaded[i], staged + (k + i * work.splits) * 16 - first, stage.row, tiles, sums);
            }
        }
        FASTVQ_ROLLED
        for (; k < last; k += work.splits) {
            const auto loaded = Weights<Number>::template load<kStationary>(weights + k * kBytes, lane);
            multiply_tile(loaded, staged + k * 16 - first, stage.row, tiles, sums);
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
                partial[places.place(split, sample, column)] = sums[n].total(i);
            }
        }
    }
}

template <class Number, bool kStationary>
FASTVQ_DEVICE void affine_samples(const Instr& instr, const char* weights, const Stage& stage, const Sums& places) {
    if (stage.rows <= 8) {
        affine_tiles<Number, 1, kStationary>(instr, weights, stage, places);
    } else if (stage.rows <= 16) {
        affine_tiles<Number, 2, kStationary>(instr, weights, stage, places);
    } else if (stage.rows <= 32) {
        affine_tiles<Number, 4, kStationary>(instr, weights, stage, places);
    } else {
        affine_tiles<Number, 8, kStationary>(instr, weights, stage, places);
    }
}

// The sums of the samples [first_sample, first_sample + rows), each in parts, which are there after a barrier.
FASTVQ_DEVICE Sums affine(const StepArgs& args, const BlockState& state, const Instr& instr, int first_sample,
                          int rows) {
    const Stage stage{state.work, instr.affine.row, first_sample, rows, state.segments, instr.num_terms, instr.depth};
    const Sums sums{reinterpret_cast<const float*>(state.work), instr.affine.splits, round_up(rows, 8), instr.columns};
    const char* weights = instr.stationary ? state.stationary : args.weights;
    if (args.layout == Layout::kFloat) {
        if (instr.stationary) {
            affine_samples<float, true>(instr, weights, stage, sums);
        } else {
            affine_samples<float, false>(instr, weights, stage, sums);
        }
    } else if (instr.stationary) {
        affine_samples<uint16_t, true>(instr, weights, stage, sums);
    } else {
        affine_samples<uint16_t, false>(instr, weights, stage, sums);
    }
    return sums;
}

}  // namespace fastvq::cuda

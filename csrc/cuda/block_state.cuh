// What a block knows of the instruction that it executes.
#pragma once

#include "cuda/device.h"
#include "cuda/step_kernel.h"

namespace fastvq::cuda {

// The vector of sample b at data + b * stride.
struct Place {
    float* data;
    int64_t stride;
};

// A term of an affine instruction at the current column. Its numbers are those from `begin` on of the vector that the
// weights multiply. They can be read four at a time if wide_end, where they end, is not 0.
struct Segment {
    const float* data;
    int64_t stride;
    int32_t begin;
    int32_t wide_end;
};

// An instruction with what it reads and writes at the current column, in shared memory. It is looked up while the block
// waits for its sources or works on the instruction before, because every wait empties the first-level cache.
struct Prepared {
    Instr instr;
    AffineWork work;
    Place out, start;
    Place sources[3];  // of attention's keys and values: the first position of the grid
    int64_t value_stride;  // of attention, between positions
    int32_t index;  // of the instruction, if it was prepared during the one before
};

// What lies before the memory that instructions work in.
struct Common {
    Prepared prepared[2];  // taken in turn
    Segment segments[kMaxTerms];
};
constexpr int kPreparedBytes = kCommonBytes - 2 * kKept * static_cast<int>(sizeof(float));
static_assert(sizeof(Common) <= kPreparedBytes && kPreparedBytes % 16 == 0);

struct BlockState {
    Prepared* prepared;
    Segment* segments;
    float* kept;  // two places for the results [sample][halves][count] of instructions, taken in turn
    char* work;
    const char* stationary;
    int column;
    int turn;  // where the next results go
    // Whose results are in the other place, and which channels.
    int kept_op, kept_first, kept_count, kept_halves;
};

FASTVQ_DEVICE bool keeps(const Instr& instr, int batch) {
    return static_cast<int64_t>(batch) * instr.count * instr.halves <= kKept;
}

FASTVQ_DEVICE float* kept_results(const BlockState& state) { return state.kept + state.turn * kKept; }

// After an instruction whose results are with kept_results, if they fit.
FASTVQ_DEVICE void has_kept(BlockState& state, const Instr& instr, int batch) {
    state.kept_op = keeps(instr, batch) ? instr.op : -1;
    state.kept_first = instr.first;
    state.kept_count = instr.count;
    state.kept_halves = instr.halves;
    state.turn ^= 1;
}

// Channel of number c = 0 .. halves * count - 1 of a slice.
FASTVQ_DEVICE int slice_channel(const Instr& instr, int c) {
    return c < instr.count ? instr.first + c : instr.half + instr.first + c - instr.count;
}

FASTVQ_DEVICE Place place_at(const DeviceView& view, int column) {
    return {view.data + (int64_t{column} & view.column_mask) * view.column_stride, view.batch_stride};
}

FASTVQ_DEVICE Segment segment_at(const StepArgs& args, const Instr& instr, int which, int column) {
    int begin = 0;
    for (int t = 0; t < which; ++t) begin += args.terms[instr.first_term + t].depth;
    const Term term = args.terms[instr.first_term + which];
    const Place place = place_at(args.values[term.op], column + term.first_column);
    const bool wide = reinterpret_cast<uintptr_t>(place.data) % 16 == 0 && place.stride % 4 == 0 && begin % 4 == 0 &&
                      term.depth % 4 == 0;
    return {place.data, place.stride, begin, wide ? begin + term.depth : 0};
}

FASTVQ_DEVICE Place source_at(const StepArgs& args, const Instr& instr, int which, int column, int64_t& value_stride) {
    const DeviceView view = args.values[instr.sources[which]];
    if (instr.code != Code::kAttend || which == 0) return place_at(view, column);
    if (which == 1) return {view.data, view.batch_stride};
    value_stride = view.column_stride;
    return {view.data - int64_t{args.row} * args.width * view.column_stride, view.batch_stride};
}

// By `helpers` threads, `helper` being the number of one.
FASTVQ_DEVICE void look_up(const StepArgs& args, const Instr& instr, Prepared& prepared, Segment* segments, int column,
                           int helper, int helpers) {
    const auto* from = reinterpret_cast<const uint32_t*>(&instr);
    auto* to = reinterpret_cast<uint32_t*>(&prepared.instr);
    for (int word = helper; word < static_cast<int>(sizeof(Instr) / 4); word += helpers) to[word] = from[word];

    const bool multiplies = instr.code == Code::kAffine, begins = multiplies || instr.code == Code::kLookup;
    const int jobs = multiplies ? 6 + instr.num_terms : 6;
    for (int job = helper; job < jobs; job += helpers) {
        if (job == 0) {
            if (multiplies) prepared.work = affine_work(instr.layout, instr.columns, instr.depth, args.batch);
        } else if (job == 1) {
            if (instr.code == Code::kStoreKeys) {
                const DeviceView keys = args.values[instr.op];
                prepared.out = {keys.data + int64_t{args.row} * args.width + column, keys.batch_stride};
            } else if (instr.code != Code::kDraw) {
                prepared.out = place_at(args.values[instr.op], column);
            }
        } else if (job == 2) {
            if (begins) prepared.start = place_at(args.starts[instr.op], column);
        } else if (job < 6) {
            if (!begins && instr.sources[job - 3] >= 0) {
                prepared.sources[job - 3] = source_at(args, instr, job - 3, column, prepared.value_stride);
            }
        } else {
            segments[job - 6] = segment_at(args, instr, job - 6, column);
        }
    }
}

// Fills state.prepared and, where the results are kept, puts the starts there; no barrier.
FASTVQ_DEVICE void prepare(const StepArgs& args, const Instr& instr, const BlockState& state) {
    // Other warps than the one that waits, if there are any.
    look_up(args, instr, *state.prepared, state.segments, state.column, kThreads - 1 - static_cast<int>(threadIdx.x),
            kThreads);
    const bool begins = instr.code == Code::kAffine || instr.code == Code::kLookup;
    if (begins && keeps(instr, args.batch)) {
        const Place start = place_at(args.starts[instr.op], state.column);
        const int width = instr.halves * instr.count;
        for (int item = threadIdx.x; item < args.batch * width; item += kThreads) {
            const int sample = item / width;
            kept_results(state)[item] = start.data[sample * start.stride + slice_channel(instr, item - sample * width)];
        }
    }
}

// By the last warp: the next instruction, if there is nothing to wait for, no segments and no starts.
FASTVQ_DEVICE void prepare_next(const StepArgs& args, int index, Prepared& prepared, int column) {
    const int helper = kThreads - 1 - static_cast<int>(threadIdx.x);
    if (helper >= 32) return;
    const Instr& instr = args.instrs[index];
    const bool ready = instr.num_waits == 0 && instr.code != Code::kAffine && instr.code != Code::kLookup;
    if (ready) look_up(args, instr, prepared, nullptr, column, helper, 32);
    if (helper == 0) prepared.index = ready ? index : -1;
}

// Where the contribution of rows above to an output comes from, and where the output goes.
struct Output {
    Place start, out;
    float* kept;  // or null
    int width;

    FASTVQ_DEVICE float start_of(int sample, int c, int channel) const {
        return kept ? kept[sample * width + c] : start.data[sample * start.stride + channel];
    }
    FASTVQ_DEVICE void write(int sample, int c, int channel, float value) const {
        if (kept) kept[sample * width + c] = value;
        store_shared_state(out.data + sample * out.stride + channel, value);
    }
};

FASTVQ_DEVICE Output output_of(const BlockState& state, const Instr& instr, int batch) {
    return {state.prepared->start, state.prepared->out, keeps(instr, batch) ? kept_results(state) : nullptr,
            instr.halves * instr.count};
}

}  // namespace fastvq::cuda

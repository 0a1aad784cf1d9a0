// What the blocks of the step kernel execute: a list of instructions for each block, made on the host from a plan.
//
// A *unit* is a set of operations of one level that read each other channel by channel (a product, its gate, the sum it
// goes into). Its channels are cut into slices, and a *task* is all of the unit's operations on one slice. Tasks are
// given to blocks once, so that a block meets the same weights at every column and can keep them in shared memory.
// A task is few instructions: a product and everything channel by channel that follows it, a *chain* of steps in which a
// thread hands its own results on, are one. A second one begins where there is another product, or where what is known
// before the last column's draw ends.
// Blocks never meet as a whole: the last instruction of a task raises its unit's counter, and instructions wait for the
// counters of what they read. A block does not wait again for what it has waited for before, nor for what it has
// computed itself.
#pragma once

#include <cstdint>
#include <vector>

#include "plan_spec.h"

#if defined(__CUDACC__)
#define FASTVQ_HOST_DEVICE __host__ __device__
#else
#define FASTVQ_HOST_DEVICE
#endif

namespace fastvq::cuda {

// Threads of a block. The emulation has fewer.
#ifndef FASTVQ_CUDA_THREADS
#define FASTVQ_CUDA_THREADS 256
#endif
constexpr int kThreads = FASTVQ_CUDA_THREADS;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads >= 32 && (kThreads & (kThreads - 1)) == 0, "threads of a block: a power of two");

// The most samples that an instruction works on at a time.
constexpr int kSamples = 64;

// A term of an instruction at the current column, in shared memory: the vector of sample b at data + b * stride floats
// (or bfloat16), which are numbers [begin, end) of the vector that the weights multiply.
struct alignas(16) Segment {
    const void* data;
    int64_t stride;
    int32_t begin, end;
    int32_t rounded;
    int32_t vector_bits;  // they are read 2^vector_bits at a time, which are 16 bytes, or one at a time
    int32_t lane_bits;    // by 2^lane_bits threads for each sample
};

// Slices are whole multiples of this, except for the last of a unit.
constexpr int kSliceStep = 8;

// How an instruction begins.
enum class Code : int32_t {
    kChain,   // with its steps, which is all
    kAffine,  // with a product, whose sums the steps take up
    kAttend,
    kDraw,
};

// What a step computes, of one channel of one sample; where there are two halves, of that channel of both.
enum class StepCode : int32_t {
    kLoad,   // values of an operation, or the starts of one
    kSum,    // starts and the sums of the product
    kLookup,
    kElu,
    kConcatElu,
    kRelu,
    kAdd,
    kGlu,
    kTanh,
    kStoreKeys,
    kView,   // nothing: it names an operation whose values attention or a draw reads or writes
};

// How the weights of affine instructions lie: by tiles of 16 columns and, of these, of 16 rows, zeros where there are
// fewer. The columns are those of the slice in the first half, then those in the second half (paired operations). A tile
// is operand A of mma.m16n8k16, columns being the rows of A: lane l has A[l / 4 + 8 (i / 2 % 2)][2 (l % 4) + i % 2 + 8 (i /
// 4)], i = 0 .. 7.
enum class Layout : int32_t {
    kFloat,   // float [2][32 lanes][4]: i / 4, lane, i % 4. Products have the precision of float32, see affine.cuh
    kBfloat,  // bfloat16 [32 lanes][8]. What they are multiplied by is rounded to bfloat16 too
};

// Go on once the task or block behind the counter is through with column - lag everywhere: once
// counters[counter_place(counter, column - lag)] >= counter_target(per_column, column - lag). At column < lag there is
// nothing to wait for.
struct Wait {
    int32_t counter;
    int32_t per_column;
    int32_t lag;
};

// Where a counter is raised for a column and what it has reached when `per_column` have raised it for that column. Even
// and odd columns count apart: blocks may be one column ahead of each other, and then a sum over all columns would not
// tell the second signal of a fast block from the first of a slow one. They are never two columns ahead
// (Program::finished_counter). Places lie apart, so that blocks that meet at one do not slow down another.
constexpr int kCounterStride = 8;
FASTVQ_HOST_DEVICE constexpr int counter_place(int counter, int column) {
    return (2 * counter + (column & 1)) * kCounterStride;
}
FASTVQ_HOST_DEVICE constexpr uint32_t counter_target(int per_column, int column) {
    return static_cast<uint32_t>(per_column) * static_cast<uint32_t>(column / 2 + 1);
}

// `depth` numbers of consecutive columns of the values of `op`, the first of them at column + first_column. They are
// numbers `begin` and following of the vector that the weights multiply.
struct Term {
    int32_t op;
    int32_t first_column;
    int32_t depth;
    int32_t begin;
    int32_t rounded;  // whether the operation stores bfloat16; see Step::stores
};

// How far the result of a step goes.
enum class Stores : int32_t {
    kRows,     // no further, unless all columns of the row are kept for others
    kFloats,   // to memory
    kRounded,  // to memory in bfloat16, if it is read at the current column alone; else as floats
};

// Items of a slice, each a channel of a sample, that a thread works on at a time; one where no thread has more, or where
// there is no memory for the planes of many.
constexpr int kManyItems = 4;
constexpr bool has_many_items(int64_t count, int64_t samples) { return count * samples > kThreads; }

// Numbers between steps are in *planes*, a float for each plane and item that a thread works on.
struct Step {
    StepCode code;
    int32_t op;             // whose values it computes, or reads
    int32_t starts;         // load: of the operation's starts instead of its values
    int32_t planes[2];      // of the result's halves; the second is -1 if there is one half
    int32_t sources[2][2];  // planes of what it reads, by source and half
    int32_t forwarded;      // whether its first source is the result of the step before
    int32_t half;           // channels between the halves that it loads or stores
    Stores stores;
    // Lookup: float [num_taps][num_codes][count * halves], only the slice, at byte `weights` of Program::weights.
    int32_t num_taps;
    int64_t weights;
};

FASTVQ_HOST_DEVICE constexpr int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Bytes of an affine instruction, at most: vectors being multiplied, and in the same place afterwards partial sums. In
// bfloat16 64 vectors of 512 numbers fit, since every piece waits for the second-level cache once.
constexpr int kStageBytes = 272 * kThreads;

FASTVQ_HOST_DEVICE constexpr int round_up(int count, int multiple) {
    return (count + multiple - 1) / multiple * multiple;
}
FASTVQ_HOST_DEVICE constexpr int round_down(int count, int multiple) { return count / multiple * multiple; }
FASTVQ_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }
FASTVQ_HOST_DEVICE constexpr int larger(int a, int b) { return a < b ? b : a; }
// The least b for which 2^b is at least so much.
FASTVQ_HOST_DEVICE constexpr int bits_for(int least) {
    int bits = 0;
    while (1 << bits < least) ++bits;
    return bits;
}
FASTVQ_HOST_DEVICE constexpr int power_of_two(int least) { return 1 << bits_for(least); }

// How the warps of a block share an affine instruction. Nothing here but `samples`, `piece` and `row` depends on the batch,
// and the order in which an output is summed depends on none of these.
//
// Warp w has tile w % lanes of 16 columns (none if that is beyond `columns`), and of the tiles of 16 rows those with tile %
// splits == w / lanes, in ascending order, which leaves `splits` sums per output.
//
// Samples are taken `samples` at a time, and of their vectors (all terms one after the other) `piece` numbers at a time:
//     stage: float or bfloat16 [samples][row], at 0; samples rounded up to 8, zeros beyond the depth up to a multiple of
//     16. A row is longer than a piece, so that reads spread over banks.
//     partial sums: float [splits], tiles of [samples][columns], at 0 as well: when all pieces have been used.
struct AffineWork {
    int lane_bits, lanes, splits;
    int samples;
    int piece, row;
    int64_t bytes;
};

// The most columns that one instruction may have.
constexpr int kMostColumns = 16 * kWarps;

// Samples that a task works on at a time, whatever its instructions: then a thread has the same ones in all of them.
FASTVQ_HOST_DEVICE constexpr int samples_at_once(int batch) { return smaller(batch, kSamples); }

FASTVQ_HOST_DEVICE constexpr AffineWork affine_work(Layout layout, int columns, int depth, int batch) {
    constexpr int kPadding = 8;
    const int size = layout == Layout::kFloat ? 4 : 2;
    AffineWork work{};
    work.lane_bits = bits_for((columns + 15) / 16);
    work.lanes = 1 << work.lane_bits;
    work.splits = kWarps / work.lanes;
    work.samples = round_up(samples_at_once(batch), 8);
    work.piece = smaller(round_up(depth, 16), round_down(kStageBytes / size / work.samples - kPadding, 16));
    work.row = work.piece + kPadding;
    const int64_t stage = static_cast<int64_t>(work.samples) * work.row * size;
    const int64_t sums = static_cast<int64_t>(work.splits) * columns * work.samples * 4;
    work.bytes = aligned(stage < sums ? sums : stage);
    return work;
}

// Attention. A job's positions are cut into tiles of kTile, and tile t belongs to strand t % kStrands of the job. A warp
// works through a strand with sums of its own; those of the strands are put together at the end, in their order. So the
// order of all sums is the same however many warps share a job: `jobs` are worked on at once, kWarps / jobs warps each.
//     query: float [kWarps][key_width], at 0; weights: float [kWarps][kTile]; strands: float [jobs][kStrands][2 + value
//     width], the largest score, the sum of weights, and the weighted sum of values.
constexpr int kTile = 128;
constexpr int kStrands = 8;
constexpr int kAttendBytes = 32 << 10;  // as many jobs at once as fit, or one

struct AttendWork {
    int jobs, job_bits;  // 2^job_bits
    int64_t weights, strands;  // byte offsets
    int64_t bytes;
};

FASTVQ_HOST_DEVICE constexpr AttendWork attend_work(int num_jobs, int key_width, int value_width) {
    AttendWork work{};
    for (work.job_bits = smaller(bits_for(kWarps), bits_for(num_jobs));; --work.job_bits) {
        work.jobs = 1 << work.job_bits;
        work.weights = round_up(kWarps * key_width, 4) * 4;
        work.strands = work.weights + kWarps * kTile * 4;
        work.bytes = work.strands + round_up(work.jobs * kStrands * (2 + value_width), 4) * int64_t{4};
        if (work.jobs == 1 || work.bytes <= kAttendBytes) return work;
    }
}

struct Instr {
    Code code;
    int32_t op;  // affine: of the product; attention: its result; draw: the logits
    // The slice: channels [first, first + count), and of paired operations as many again at half of the channels.
    int32_t first, count, halves, half;
    int32_t many_items;              // whether a thread works on kManyItems items at a time
    int32_t next_row, next_channel;  // of the items of a thread that follow each other: kThreads / count and the rest
    int32_t first_wait, num_waits;  // before it starts
    int32_t signal;                 // counter to raise when it is done, or -1
    // The first steps are the loads, and the first of these load what needs no wait. Attention: its query, keys, values
    // and result, and an activation of the result if one follows; draw: logits.
    int32_t first_step, num_steps, num_early, num_loads;
    // Affine.
    int32_t first_term, num_terms, depth;
    int32_t columns;     // a multiple of 16
    int32_t stationary;  // weights are in shared memory, at byte `weights` of it; otherwise at that byte of Program::weights
    int64_t weights;
    AffineWork affine;
    AttendWork attend;
    // Attention.
    int32_t heads, key_width, value_width, inclusive;
    // Attention: jobs sample * heads + head. Draw: samples.
    int32_t first_job, last_job;
};

// Its instructions, and of the program's other lists the parts that they refer to.
struct Block {
    int32_t first_instr, last_instr;
    int32_t first_wait, last_wait;
    int32_t first_term, last_term;
    int32_t first_step, last_step;
    // What this block copies to the start of its shared memory: bytes [first, first + bytes) of Program::weights.
    int64_t stationary_first, stationary_bytes;
};

// Where an operation's vectors lie: sample b, column c at data + b * batch_stride + (c & column_mask) * column_stride.
// The mask is -1 for rows of vectors, 1 for vectors of the current position alone (two places, taken in turn), 0 for
// vectors that are the same at all positions. Attention's keys and values lie as in the CPU engine (grid_plan.h).
struct DeviceView {
    float* data;
    int64_t batch_stride;
    int64_t column_stride;
    int64_t column_mask;
};

// As a block keeps them during a launch: with where the operation's vectors lie, and with what that decides decided.
struct alignas(16) HeldTerm {
    DeviceView view;
    Term term;
    int32_t vector_bits, lane_bits;  // of its segments
};
struct alignas(16) HeldStep {
    DeviceView view;
    Step step;
};

// Byte offsets of the parts of a block's program where the block keeps it: instructions come first.
struct HeldProgram {
    int64_t steps, terms, waits;
    int64_t bytes;
};

FASTVQ_HOST_DEVICE constexpr HeldProgram held_program(const Block& block) {
    HeldProgram held{};
    held.steps = aligned((block.last_instr - block.first_instr) * static_cast<int64_t>(sizeof(Instr)));
    held.terms = held.steps + aligned((block.last_step - block.first_step) * static_cast<int64_t>(sizeof(HeldStep)));
    held.waits = held.terms + aligned((block.last_term - block.first_term) * static_cast<int64_t>(sizeof(HeldTerm)));
    held.bytes = held.waits + aligned((block.last_wait - block.first_wait) * static_cast<int64_t>(sizeof(Wait)));
    return held;
}

// What a block has in shared memory behind its weights, as byte offsets from there: the numbers of instructions being
// worked on; planes; where the terms of an instruction lie; and the block's part of the program, which stays for the
// whole launch. All of it is aligned to 16 bytes.
struct BlockMemory {
    int64_t planes, segments, program;
    int64_t bytes;
};

struct Program {
    std::vector<Instr> instrs;
    std::vector<Block> blocks;
    std::vector<Wait> waits;
    std::vector<Term> terms;
    std::vector<Step> steps;
    std::vector<char> weights;  // every region aligned to 16 bytes
    Layout layout;              // of the weights
    int32_t num_counters;       // in memory: counter_place(num_counters, 0) words
    // Raised by every block at the end of a column. Before a block begins a column c, it waits until all have finished
    // column c - 2: vectors of the current position alone have two places, taken in turn.
    int32_t finished_counter;
    BlockMemory memory;    // behind the weights that stay
    int64_t shared_bytes;  // of shared memory, the most that any block needs in all
};

struct ProgramOptions {
    int64_t blocks;        // at most; those without work are left out. All of them have to be resident at once
    int64_t shared_limit;  // bytes of shared memory that a block may have
    bool bf16;             // weights, and what they multiply; sums are float32
};

// The same for the same arguments. Throws std::invalid_argument if the operations do not form a plan, or if they need
// more shared memory for their work than there is.
Program make_program(const std::vector<OpSpec>& ops, const std::vector<TermSpec>& terms, int64_t output,
                     const StepShape& shape, const ProgramOptions& options);

constexpr int kMaxTerms = 16;
static_assert(kMaxTerms >= kMaxSegments, "room for all terms of an operation");

// Shared memory, in bytes, of what an instruction works on: that of affine_work, attend_work or draw_work, else 0.
int64_t work_bytes(const Instr& instr, const StepShape& shape);

// The draw, one sample at a time.
//     scan: double [kThreads], at 0; reduce: double [kWarps] (or floats and integers of the warps, 8 bytes for each);
//     values: float [num_codes], the logits, then their weights; sorted: float [num_codes], weights in order of rank;
//     ranks: int32 [num_codes].
struct DrawWork {
    int64_t reduce, values, sorted, ranks;  // byte offsets
    int64_t bytes;
};

FASTVQ_HOST_DEVICE constexpr DrawWork draw_work(int64_t num_codes) {
    const int64_t array = (num_codes + 3) / 4 * 16;
    DrawWork work{};
    work.reduce = kThreads * 8;
    work.values = work.reduce + round_up(kWarps, 2) * 8;
    work.sorted = work.values + array;
    work.ranks = work.sorted + array;
    work.bytes = work.ranks + array;
    return work;
}

}  // namespace fastvq::cuda
